"""doctor: what is installed, what is missing and why, and a short self-test."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from racm3_jax.commands import arguments as options

_MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def register(commands: Any) -> None:
    """Adds `doctor` to the parser's subcommands."""
    text = "Check this installation and report what is missing."
    sub = commands.add_parser("doctor", help=text, description=text)
    sub.set_defaults(command=_doctor)
    sub.add_argument(
        "--workdir",
        type=options.path,
        default=".",
        help="where results would be written",
    )
    sub.add_argument("--no_self_test", action="store_true", help="versions only")
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from racm3_jax.doctor import examine

    findings = []
    for finding in examine(arguments.workdir, self_test=not arguments.no_self_test):
        findings.append(finding)
        if not arguments.json:
            mark = _MARKS[finding.verdict]
            print(f"{mark}  {finding.name:<17} {finding.words}", flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    return int(any(finding.verdict == "problem" for finding in findings))
