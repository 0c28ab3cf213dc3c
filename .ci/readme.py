"""The README's commands as a shell script, so that CI runs what a reader types.

    python .ci/readme.py README.md Quickstart

Prints the lines of all ```bash blocks under the heading, unchanged.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def read_commands(text: str, heading: str) -> str:
    """The bash blocks of the section `## heading`, joined.

    Raises:
      SystemExit: there is no such section, or it has no bash block.
    """
    sections = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    if heading not in found:
        raise SystemExit(f"no section {heading!r}; there are: {', '.join(found)}")
    blocks = re.findall(
        r"^```bash\n(.*?)^```", found[heading], re.DOTALL | re.MULTILINE
    )
    if not blocks:
        raise SystemExit(f"section {heading!r} has no bash block")
    return "".join(blocks)


if __name__ == "__main__":
    sys.stdout.write(read_commands(Path(sys.argv[1]).read_text("utf-8"), sys.argv[2]))
