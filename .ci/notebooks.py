"""Executes notebooks of colab/ and stores their outputs, without progress and paths.

    python .ci/notebooks.py

In an environment with the extra `test`; CI executes all notebooks, but keeps nothing.
`your_own_images` is not stored: what it trains in a minute of a CPU draws blurs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

COLAB = Path(__file__).resolve().parent.parent / "colab"
STORED = ("quickstart", "train")


def store(path: Path) -> None:
    """Executes one notebook in an empty folder and writes what it shows."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            book, timeout=1200, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = output.text.replace(f"{folder}{os.sep}", "")
    book.metadata["language_info"] = {"name": "python"}
    path.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> None:
    for name in STORED:
        store(COLAB / f"{name}.ipynb")


if __name__ == "__main__":
    main()
