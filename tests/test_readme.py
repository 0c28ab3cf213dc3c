"""The commands and files of the README exist, and CI runs its commands."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from racm3_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "experiments/results/README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def sections():
    """Headings of the README and their texts."""
    parts = re.split(r"^## (.+)$", README, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands():
    """The `racm3 ...` lines of the bash blocks, as words."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            for part in line.split("#")[0].split("&&"):
                words = shlex.split(part)
                while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
                    words = words[1:]
                if words[:1] == ["racm3"]:
                    lines.append(words[1:])
    return lines


def subparser(words):
    """The parser of a command, and the rest of its words."""
    parser = cli._parser()
    while True:
        groups = [
            a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
        ]
        if not groups or not words:
            return parser, words
        assert words[0] in groups[0].choices, words
        parser, words = groups[0].choices[words[0]], words[1:]


def test_there_are_commands_to_check():
    assert len(commands()) > 15


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_exists(words):
    parser, rest = subparser(list(words))
    known = {flag for action in parser._actions for flag in action.option_strings}
    given = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert not {f for f in given - known if not f.startswith("--config")}


def test_ci_runs_the_printed_commands():
    run = {
        a or b for a, b in re.findall(r'^readme (?:"(.+)"|(\w+))$', CI, re.MULTILINE)
    }
    assert run == {name for name, text in sections().items() if "```bash" in text}
    for name in run:
        script = subprocess.run(
            [sys.executable, ".ci/readme.py", "README.md", name],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        blocks = re.findall(r"```bash\n(.*?)```", sections()[name], flags=re.DOTALL)
        assert script == "".join(blocks)
    unknown = subprocess.run(
        [sys.executable, ".ci/readme.py", "README.md", "Nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert unknown.returncode and "there are: " in unknown.stderr


def test_the_readme_takes_two_minutes_to_read():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert not [line for line in lines if len(line) > 400]


def test_the_map_is_the_tree():
    section = README.split("## Map of the code")[1].split("\n## ")[0]
    mapped = set(re.findall(r"`(\w+/|\w+\.py)`", section))
    package = ROOT / "racm3_jax"
    tree = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    tree |= {p.name for p in package.glob("[!_]*.py")}
    assert tree <= mapped, "not in the map"
    gone = {n for n in mapped if not (package / n).exists()}
    assert not gone, "in the map, not in the tree"


def test_every_config_is_named():
    names = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert names <= set(re.findall(r"`(\w+)(?::\w+)?`", README))


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", RESULTS):
        assert (ROOT / "experiments/results" / target).exists(), target
    for path in re.findall(r"`((?:experiments|colab|configs)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
