"""demo: all tasks of a work directory, on a page in the browser."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands.configs import UsageError

if TYPE_CHECKING:
    from racm3_jax.demo.uploads import UploadFolder


def register(commands: Any) -> None:
    """Adds `demo` to the parser's subcommands."""
    text = "A web demo, on this machine only (needs the [demo] extra)."
    sub = commands.add_parser("demo", help=text, description=text)
    sub.set_defaults(command=_demo)
    sub.add_argument(
        "--workdir",
        type=options.path,
        required=True,
        help="of quickstart or train, or the folder generator of fit",
    )
    options.add_memory(sub)
    sub.add_argument(
        "--port",
        type=options.integer(0, 2**16 - 1),
        default=7860,
        help="0 takes any free port",
    )
    sub.add_argument(
        "--int8", action="store_true", help="8-bit weights, on accelerators"
    )


def _demo(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(missing_gradio(Path(arguments.workdir)))
    from racm3_jax.demo import server, uploads

    server.find_port(arguments.port)
    with uploads.private_folder() as folder:
        _serve(arguments, uploads.UploadFolder(folder))


def _serve(arguments: argparse.Namespace, uploads: UploadFolder) -> None:
    from racm3_jax import run
    from racm3_jax.demo import server

    generator = run.load(arguments.workdir, memory=options.local_memory(arguments))
    if arguments.int8:
        generator = generator.quantized()
    notice = ""
    if generator.retriever is None:
        notice = missing_memory(arguments.workdir)
        print(notice)
    server.prepare_environment(uploads.folder)
    from racm3_jax.demo.page import build_page
    from racm3_jax.demo.session import MAX_UPLOAD_BYTES, Session

    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    page = build_page(Session(generator), notice)
    server.serve(page, arguments.port, MAX_UPLOAD_BYTES, uploads)


def missing_gradio(workdir: Path) -> str:
    """How to install gradio, and the alternative without it."""
    report = workdir / "report.html"
    without = f"open {report} without it"
    if not report.exists():
        without = "without it, racm3 quickstart writes a report.html"
    return (
        "the demo needs gradio, which is not installed: pip install 'racm3_jax[demo]' "
        f"(in a clone, pip install -e '.[demo]'); {without}"
    )


def missing_memory(workdir: str) -> str:
    """What is not possible without a memory."""
    return (
        f"There is no memory in {workdir}: nothing can be retrieved, only your own "
        "documents are used; racm3 memory build makes one, --memory=FOLDER opens it."
    )
