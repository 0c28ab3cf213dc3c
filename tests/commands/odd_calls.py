"""Hundreds of mistaken calls of the command line.

    every command  x  every option  x  invalid values of the option's type
    every command that writes  x  every way in which a disk can fail

Each must end by itself, in one sentence and exit status 2 (or do its work), without a
traceback, and leave every file unchanged. `run_odd_calls(folder)` makes all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
for _folder in (HERE, HERE.parent, HERE.parent / "demo"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from memory_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax import cli, run
from racm3_jax.commands import memory as memory_commands
from racm3_jax.memory.memory import Memory
from racm3_jax.types import (
    Document,
    GenerationOutput,
    Retrieved,
    Segment,
)

CONFIGS = HERE.parent.parent / "configs"
LONG = "x" * 300
# `{name}` is a path made by `make_world`.
READ_FILE = (
    "--",
    "", " ", "{missing}", "{folder}", "{file}/below", LONG, "{loop}", "{garbage}",
    "{empty}", "~nobody/file", "{missing}\u202e\udcff", "{missing}\n",
)  # fmt: skip
READ_FOLDER = (
    "--",
    "", " ", "{missing}", "{file}", "{file}/below", LONG, "{loop}", "{empty_folder}",
    "{folder}", "~nobody/folder", "{missing}\u202e\udcff",
)  # fmt: skip
PICTURE_OUT = (
    "--",
    "", " ", "{folder}", "{file}/below.png", f"{LONG}.png", "{foreign}", "{file}",
    "{device}", "{missing}/x.jpg", "{missing}/x", "{memory}/x.png",
    "/proc/racm3/x.png", "{beside}", "{loop}",
)  # fmt: skip
NEW_FOLDER = (
    "--",
    "", " ", "{folder}", "{file}", "{file}/below", LONG, "/proc/racm3/x", "{device}",
    "{loop}", "{memory}/x",
)  # fmt: skip
WORKDIR_OUT = (
    "", " ", "{file}", "{file}/below", LONG, "/proc/racm3/x", "{device}", "{loop}",
    "{foreign_run}",
)  # fmt: skip
WHOLE = ("--", "", "abc", "-1", "1.5", "nan", "9" * 40, "0x10", "١.٥")
NUMBER = ("--", "", "abc", "nan", "inf", "-inf", "1e999", "1,5")
CHOICE = ("", "nothing", "--", "EXACT")
SOURCE = (
    "--",
    "", " ", "folder", "folder:", "nothing:{folder}", "folder:{missing}",
    "folder:{empty_folder}", "folder:{file}", f"folder:{LONG}", "folder:{loop}",
    "folder:{folder};colour=red", "webdataset:{garbage}", "webdataset:{missing}",
    "webdataset:{empty}", "parquet:{garbage}", "jsonl:{garbage}", "jsonl:{deep}",
    "coco:{folder}", "tfds:{folder}", "array_record:{garbage}", "embeddings:{folder}",
    "flagworld:nothing", "\udcff:x", "jsonl:{file}/below",
)  # fmt: skip
CONFIG = (
    "", "{missing}", "{folder}", "{garbage}", "{file}", "{raises}", "{exits}",
    "{broken}", "{no_function}", "{wrong_function}", "{returns_list}", "{empty_py}",
    "{empty_config}", "{file}/x.py", f"{LONG}.py",
)  # fmt: skip
JSON_LIST = (*READ_FILE, "{deep}", "{json_text}", "{json_numbers}", "{json_missing}")

_SAMPLING = {
    "--num_samples": WHOLE, "--seed": WHOLE, "--temperature": (*NUMBER, "-1"),
    "--top_p": (*NUMBER, "0", "2"), "--top_k": WHOLE,
    "--min_p": (*NUMBER, "-1", "2"),
}  # fmt: skip
_GUIDANCE = {
    "--guidance": (*NUMBER, "-1"), "--contrastive_k": WHOLE,
    "--contrastive_alpha": (*NUMBER, "0", "2"),
}  # fmt: skip
_RETRIEVAL = {"--memory": (*READ_FOLDER, "{broken_memory}"), "--num_retrieved": WHOLE}
_DRAWING = {"--preview": PICTURE_OUT, "--out": PICTURE_OUT, "--rank_by": CHOICE}
_REGION = {
    "--box": ("", "1,2,3", "a,b,c,d", "5,5,5,5", "-1,0,4,4", "0,0,1e3,9", "9" * 99),
    "--mask": READ_FILE, "--max_spans": WHOLE, "--region_prompt": CHOICE,
}  # fmt: skip
_WORKDIR = {"--workdir": READ_FOLDER}
_FILTERS = {
    "--max_bad": (*NUMBER, "-1", "2"), "--opt_out": READ_FILE, "--held_out": SOURCE,
    "--max_nsfw": NUMBER, "--max_watermark": NUMBER,
}  # fmt: skip
_MODELS = {"--tokenizer": READ_FOLDER, "--embedder": (*READ_FOLDER, "name:")}
_MEMORY = {"--memory": (*READ_FOLDER, "{broken_memory}")}

# The words of a valid call, and invalid values of each option.
COMMANDS: dict[str, dict[str, Sequence[str]]] = {
    "generate --workdir={model} --prompt=flag": {
        **_WORKDIR, "--prompt": ("", " "), **_RETRIEVAL, **_SAMPLING, **_GUIDANCE,
        **_DRAWING, "--num_neighbours": WHOLE,
    },
    "generate --workdir={model} --parts={parts}": {
        "--parts": JSON_LIST, "--out": PICTURE_OUT, "--max_segments": WHOLE,
        "--guidance": ("3",), "--contrastive_k": ("3",), "--preview": ("p.png",),
    },
    "caption --workdir={model} --image={image}": {
        **_WORKDIR, "--image": READ_FILE, **_RETRIEVAL, **_SAMPLING, **_GUIDANCE,
        "--num_candidates": WHOLE, "--caption_prompt": CHOICE,
    },
    "infill --workdir={model} --image={image} --box=0,0,9,9": {
        "--image": READ_FILE, **_REGION, **_DRAWING, **_RETRIEVAL,
        "--text": ("", "no gap", "<mask><mask>"),
    },
    "edit --workdir={model} --image={image} --box=0,0,9,9 --document {image} flag": {
        "--image": READ_FILE, **_REGION, **_DRAWING, "--num_neighbours": WHOLE,
    },
    "classify --workdir={model} --image={image} --support={support}": {
        **_WORKDIR, "--image": READ_FILE, "--support": JSON_LIST, "--by": CHOICE,
        "--labels": ("", "one", ",", "other,labels"), "--shots_per_pass": WHOLE,
    },
    "demo --workdir={model} --port=0": {
        **_WORKDIR, "--port": (*WHOLE, "70000"), **_RETRIEVAL,
    },
    "memory build --memory=new --source=folder:{images}": {
        "--memory": NEW_FOLDER, "--source": SOURCE, **_FILTERS, **_MODELS,
        "--index": CHOICE, "--num_query_variants": WHOLE, "--seed": WHOLE,
        "--query_drop": (*NUMBER, "-1", "1"), "--max_ram": (*NUMBER, "-1"),
        "--recall_target": (*NUMBER, "0", "2"), "--deduplicate": CHOICE,
    },
    "memory search --memory={memory} --text=flag": {
        **_MEMORY, "--text": ("", " "), "--image": ("{image}",), "--k": (*WHOLE, "0"),
        "--out": PICTURE_OUT, "--originals": ("", "{missing}", "{file}"), **_MODELS,
    },
    "memory search --memory={memory} --image={image}": {"--image": READ_FILE},
    "memory stats --memory={memory}": {
        **_MEMORY, "--num_queries": WHOLE, "--out": PICTURE_OUT, **_MODELS,
    },
    "memory verify --memory={memory}": {**_MEMORY, "--share": (*NUMBER, "0", "2")},
    "memory remove --memory={memory} --ids=none": {
        **_MEMORY, "--ids": (*READ_FILE, ",", "a,b"), "--url_pattern": ("x",),
        "--like": ("{image}",),
    },
    "memory remove --memory={memory} --like={image}": {
        "--like": READ_FILE, "--min_similarity": (*NUMBER, "2"), **_MODELS,
    },
    "memory add --memory={memory} --source=folder:{images}": {
        **_MEMORY, "--source": SOURCE, "--max_bad": (*NUMBER, "2"), **_MODELS,
    },
    "memory neighbours --memory={memory} --k=2": {
        **_MEMORY, "--k": (*WHOLE, "0"), "--engine": CHOICE,
        "--out": (*NEW_FOLDER, "{memory}", "{memory}/index", "{foreign_run}"),
    },
    "memory plan --num_documents=1e6": {
        "--num_documents": (*NUMBER, "0", "-5"), "--d_embed": (*WHOLE, "0"),
        "--hosts": (*WHOLE, "0"), "--devices_per_host": (*WHOLE, "0"),
        "--index": ("nothing", "--"),
    },
    "train --config={config} --workdir=new": {
        "--config": CONFIG, "--workdir": WORKDIR_OUT,
        "--profile_steps": ("3", "a:b", "-1:2", ":"),
        "--config.train.num_steps": ("abc", "1.5", ""),
        "--config.train.num_step": ("1",), "--config.nothing": ("1",),
        "--config.train": ("1",), "--config.": ("1",), "--configx": ("1",),
    },
    "evaluate --workdir=new": {
        "--suite": CHOICE, "--config": CONFIG, "--workdir": WORKDIR_OUT,
        "--config.world.nothing": ("1",), "--config.suite": ("nothing",),
    },
    "quickstart --short --workdir=new": {
        "--config": CONFIG, "--workdir": WORKDIR_OUT, "--config.world": ("1",),
    },
    "sweep --config={sweep} --workdir=new": {
        "--config": CONFIG, "--workdir": WORKDIR_OUT, "--config.nothing": ("1",),
    },
    "estimate --config={config} --device=h100": {
        "--config": CONFIG, "--device": ("", "h100:0", "h100:x", "none", ":", "h100:-1"),
    },
    "doctor --no_self_test": {"--workdir": ("", " ", "{file}/below", LONG)},
    "tokenize {image} --tokenizer={image_tokenizer} --roundtrip": {
        "--tokenizer": READ_FOLDER, "--out": PICTURE_OUT,
    },
}  # fmt: skip

# Calls that do not fit in the tables.
SINGLE = (
    "nothing", "generate", "memory nothing", "memory build", "--nothing",
    "generate --workdir={model}", "generate --workdir={model} --prompt=a --parts=b",
    "generate --workdir={model} --prompt=a --num_neighbours=1",
    "generate --workdir={model} --prompt=a --contrastive_k=2 --guidance=2",
    "generate --workdir={model} --prompt=a --document {missing} flag",
    "generate --workdir={model} --prompt=a --document {image}",
    "generate --workdir={model} --prompt=a --out=x.png --preview=x.png",
    "generate --workdir={model} --prompt=a --document {own} flag --out={own}",
    "infill --workdir={model}", "infill --workdir={model} --image={image}",
    "infill --workdir={model} --image={image} --box=0,0,9,9 --mask={image}",
    "infill --workdir={model} --text=a<mask> --box=0,0,9,9",
    "infill --workdir={model} --image={own} --box=0,0,9,9 --out={own}",
    "edit --workdir={model} --image={image} --box=0,0,9,9",
    "memory search --memory={memory}", "memory remove --memory={memory}",
    "memory remove --memory={memory} --ids=a --url_pattern=b --compact",
    "train", "train --config --workdir=new", "train --workdir=new",
    "train --config={config}", "sweep --config={config} --workdir=new",
    "estimate --device=h100", "evaluate --config={config} --workdir=new",
    "train --config={eval_config} --workdir=new", "tokenize", "convert", "export",
    "tokenize {missing} --tokenizer={image_tokenizer}",
    "tokenize {garbage} --tokenizer={image_tokenizer}",
    "support", "support --example {missing} a", "support --example {garbage} a",
    "support --example {image} a --out={image}", "support --folder={empty_folder}",
    "support --folder={missing}", "support --folder={file}/below", "completion",
    "completion fish", "trian", "evaluate", "train --config nothing --workdir=new",
    "tokenize {image}", "convert nothing {file} new", "export {folder} new",
    "export {file} new", "export {missing} new", "export {file}/below new",
    *(f"convert {kind} {source} new" for kind in ("clip", "vqgan", "chameleon")
      for source in ("{missing}", "{garbage}", "{empty}", "{empty_folder}",
                     "{file}/below", "hub:", "hub:a", LONG, "{loop}")),
)  # fmt: skip

# A call that takes longer hangs.
SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; `fault` makes the disk fail while it runs."""

    words: tuple[str, ...]
    fault: str = ""

    def __str__(self) -> str:
        words = " ".join(w if len(w) < 60 else f"{w[:60]}…" for w in self.words)
        return ascii(f"racm3 {words}" + (f" [{self.fault}]" if self.fault else ""))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a call.

    Attributes:
      status: the exit status; None after a traceback or a hang.
      error: what it wrote to standard error.
      fault: "", or what is wrong: "traceback", "hang", "partial" or "sentence".
      details: of the fault.
    """

    status: int | None
    error: str
    fault: str = ""
    details: str = ""


class Hang(BaseException):
    """A call took too long."""


def make_calls() -> list[Call]:
    """All odd calls, in a fixed order."""
    calls = [Call(tuple(line.split())) for line in SINGLE]
    for line, options in COMMANDS.items():
        words = line.split()
        for option, values in options.items():
            kept = [w for w in words if not w.startswith(f"{option}=")]
            calls += [Call((*kept, f"{option}={value}")) for value in values]
    for fault in FAULTS:
        calls += [Call(tuple(line.split()), fault) for line in WRITING]
    return list(dict.fromkeys(calls))


# Faults of the disk: what fails, and how.

# Calls that succeed, with stand-ins for the models.
WRITING = (
    "generate --workdir=x --prompt=flag --out=new/x.png",
    "generate --workdir=x --prompt=flag --out={own}",
    "generate --workdir=x --prompt=flag --out=x.png --preview=p.png",
    "memory build --memory=new --source=folder:{images}",
    "memory search --memory={memory} --text=nation3",
    "memory stats --memory={memory}",
    "memory add --memory={memory} --source=folder:{images}",
    "memory remove --memory={memory} --ids=doc-3",
    "memory remove --memory={memory} --ids=doc-3 --compact",
    "memory neighbours --memory={memory} --k=2",
    "memory neighbours --memory={memory} --k=2 --out=new",
)


@contextlib.contextmanager
def _no_compilation_is_kept() -> Iterator[None]:
    """jax would leave partial files in its cache, which other processes would read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _no_file_grows_over(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def _failing(function: str, number: int) -> Callable[[], Any]:
    """`os.function` fails where the calls write."""
    original = getattr(os, function)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("racm3_jax"):
            name = args[0] if isinstance(args[0], str | os.PathLike) else None
            raise OSError(number, os.strerror(number), name)
        return original(*args, **kwargs)

    return lambda: mock.patch.object(os, function, fail)


FAULTS: dict[str, Callable[[], Any]] = {
    "files of 0 bytes": lambda: _no_file_grows_over(0),
    "files of 100 bytes": lambda: _no_file_grows_over(100),
    "files of 3000 bytes": lambda: _no_file_grows_over(3000),
    "fsync: disk full": _failing("fsync", errno.ENOSPC),
    "replace: permission denied": _failing("replace", errno.EACCES),
    "rename: quota": _failing("rename", errno.EDQUOT),
    "open: read-only": _failing("open", errno.EROFS),
    "open: too many files": _failing("open", errno.EMFILE),
}


class _Tokenizer(FakeTokenizer):
    def decode(self, document: Any) -> Document:
        return make_document(0, source=document.source)


class _Generator:
    """Generates a grey square for every prompt."""

    retriever = None

    def text_to_image(self, prompt: str, on_progress: Any, **_: Any) -> Any:
        square = Segment(image=np.full((8, 8, 3), 128, np.uint8))
        given = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())
        document = Document("x-0", (square,), metadata={"given_segments": 0})
        return GenerationOutput([document], np.zeros(1), given, prompt, 0)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    models = (_Tokenizer(), FakeEmbedder())
    with (
        mock.patch.object(memory_commands, "_load_models", lambda _: models),
        mock.patch.object(run, "load", lambda *_, **__: _Generator()),
    ):
        yield


# The files of the calls.


def make_world(folder: pathlib.Path) -> dict[str, str]:
    """Files and folders of every kind below `folder`; their paths by name."""
    folder.mkdir(parents=True)
    names = ("folder", "empty_folder", "images", "foreign_run", "broken_memory")
    for name in names:
        (folder / name).mkdir()
    (folder / "folder" / "mine.txt").write_text("mine")
    for i in range(3):
        pixels = np.full((8, 8, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"nation{i} on scene{i}")
    texts = {
        "file": "mine",
        "empty": "",
        "deep": "[" * 100_000,
        "json_text": '"text"',
        "json_numbers": '[{"text": 1}, {"image": 2, "label": 3}]',
        "json_missing": '[{"image": "none.png", "label": "x"}]',
        "raises.py": "def get_config(arg):\n    return {}['x']\n",
        "exits.py": "import sys\nsys.exit(1)\n",
        "broken.py": "def get_config(:\n",
        "no_function.py": "x = 1\n",
        "wrong_function.py": "def get_config():\n    return 1\n",
        "returns_list.py": "def get_config(arg):\n    return [1]\n",
        "empty_py.py": "",
        "empty_config.py": "from ml_collections import ConfigDict\n\n\n"
        "def get_config(arg):\n    return ConfigDict()\n",
        "parts": '[{"text": "the flag of"}]',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "garbage").write_bytes(bytes(range(256)) * 8)
    for name in ("foreign", "beside"):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
    (folder / "beside.json").write_text('{"mine": 1}')
    (folder / "beside.png").unlink()
    for name in ("samples.png", "loss.png"):
        Image.new("RGB", (8, 8), "red").save(folder / "foreign_run" / name)
    for name in ("table.md", "results.json", "report.html", "sweep.json", "sweep.png"):
        (folder / "foreign_run" / name).write_text("mine")
    (folder / "broken_memory" / "manifest.json").write_text("{}")
    (folder / "loop").symlink_to("loop")
    # In place of a device: real ones are not risked.
    os.mkfifo(folder / "device")
    support = [{"image": f"images/{i}.png", "label": "ab"[i % 2]} for i in range(2)]
    (folder / "support").write_text(json.dumps(support))
    from racm3_jax import own_files

    own_files.write_png(folder / "own.png", np.zeros((8, 8, 3), np.uint8))
    Memory.build(
        [make_document(i) for i in range(6)],
        tokenizer=_Tokenizer(),
        embedder=FakeEmbedder(),
        path=folder / "memory",
        index="exact",
        num_query_variants=1,
    ).close()
    shipped = pathlib.Path(cli.racm3_jax.__file__).parent / "shipped" / "flagworld"
    found = {path.name.split(".")[0]: str(path) for path in folder.iterdir()}
    return found | {
        "beside": str(folder / "beside.png"),
        "missing": str(folder / "missing"),
        "image": str(folder / "images" / "1.png"),
        "model": str(shipped),
        "image_tokenizer": str(shipped / "tokenizer" / "image"),
        "config": str(CONFIGS / "flagworld_tiny.py"),
        "eval_config": str(CONFIGS / "eval" / "flagworld.py"),
        "sweep": str(CONFIGS / "sweeps" / "flagworld_alpha.py:tiny"),
    }


def snapshot(folder: pathlib.Path) -> dict[str, tuple]:
    """Every path below `folder` with the facts that change when it is written."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            state = os.lstat(path)
            written = (state.st_ino, state.st_mtime_ns) if name in files else ()
            found[os.path.relpath(path, folder)] = (state.st_size, *written)
    return found


class Runner:
    """Makes calls in one folder, and checks what they leave.

    Args:
      folder: a new one; gets the world, and the folder `out` where calls run.
      seconds: that a call may take.
    """

    def __init__(self, folder: pathlib.Path, seconds: float = SECONDS) -> None:
        self.folder = folder
        self.world = folder / "world"
        self.out = folder / "out"
        self.seconds = seconds
        self.paths = make_world(self.world)
        self.out.mkdir()
        self.before = snapshot(self.world)

    def __call__(self, call: Call) -> Outcome:
        words = [word.format_map(self.paths) for word in call.words]
        if call.fault:
            # Such calls may succeed: each has its own folder.
            world = Runner(self.folder / "fault", self.seconds)
            words = [w.replace(str(self.world), str(world.world)) for w in words]
            with _stand_ins():
                with _no_compilation_is_kept(), FAULTS[call.fault]():
                    outcome = world._make(words)
                outcome = world._judge_fault(words, outcome)
            _delete(world.folder)
            return outcome
        return self._judge(self._make(words))

    def _make(self, words: Sequence[str]) -> Outcome:
        out, error = io.StringIO(), io.StringIO()
        here = os.getcwd()

        def stop(*_: Any) -> None:
            raise Hang

        before = signal.signal(signal.SIGALRM, stop)
        os.chdir(self.out)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(error),
                warnings.catch_warnings(),
            ):
                # jax warns where its compilation cache cannot be written.
                warnings.simplefilter("ignore")
                status = cli.main(words)
        except Hang:
            return Outcome(None, error.getvalue(), "hang", f"over {self.seconds:g} s")
        except SystemExit as exit:
            status = int(exit.code or 0)
        except BaseException:  # noqa: BLE001, whatever it is, it is a traceback
            return Outcome(None, error.getvalue(), "traceback", traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.chdir(here)
        return Outcome(status, error.getvalue())

    def _judge_fault(self, words: Sequence[str], outcome: Outcome) -> Outcome:
        """After a disk failure no hidden file is left, and the same call then works."""
        # Parts of neighbour tables resume, and the next call must remove them.
        hidden = [n for n in self._find_hidden() if "-parts.partial" not in n]
        outcome = self._judge_sentence(outcome)
        if not outcome.fault and hidden:
            return dataclasses.replace(outcome, fault="partial", details=str(hidden))
        if outcome.fault or outcome.status == 0:
            return outcome
        again = self._make(words)
        hidden = self._find_hidden()
        if again.status != 0 or hidden:
            details = f"{again}, then left {hidden}"
            return dataclasses.replace(outcome, fault="partial", details=details)
        return outcome

    def _find_hidden(self) -> list[str]:
        """Temporary files and locks that writers left."""
        names = sorted(snapshot(self.folder))
        return [
            name
            for name in names
            if os.path.basename(name).startswith(".") or ".partial" in name
        ]

    def _judge(self, outcome: Outcome) -> Outcome:
        """Looks for partial outputs, and for more or less than one sentence."""
        outcome = self._judge_sentence(outcome)
        fault, details = outcome.fault, outcome.details
        left = sorted(snapshot(self.out))
        if left and left[0] == "new.building":
            # An interrupted build resumes, and does not block another one.
            good = "memory build --memory=new --index=exact --source=folder:{images}"
            again = self._make([w.format_map(self.paths) for w in good.split()])
            left = sorted(snapshot(self.out))
            if again.status == 0 and not any(".building" in name for name in left):
                left = []
        if outcome.status == 0:
            left = [name for name in left if os.path.basename(name).startswith(".")]
        changed = self._find_changes()
        if not fault and (left or changed and outcome.status != 0):
            fault, details = "partial", f"left {left[:5]}, changed {changed[:5]}"
        if changed:
            _delete(self.world)
            make_world(self.world)
            self.before = snapshot(self.world)
        _delete(self.out)
        self.out.mkdir()
        return dataclasses.replace(outcome, fault=fault, details=details)

    @staticmethod
    def _judge_sentence(outcome: Outcome) -> Outcome:
        if outcome.fault or outcome.status in (0, 1):
            return outcome
        lines = outcome.error.rstrip("\n").split("\n")
        sentences = [line for line in lines if line.startswith("racm3: ")]
        if outcome.status == 2 and sentences == lines[-1:]:
            return outcome
        details = f"exit status {outcome.status}: {outcome.error[-500:]}"
        return dataclasses.replace(outcome, fault="sentence", details=details)

    def _find_changes(self) -> list[str]:
        after = snapshot(self.world)
        names = self.before.keys() | after.keys()
        return sorted(n for n in names if self.before.get(n) != after.get(n))


def _delete(folder: pathlib.Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def run_odd_calls(
    folder: pathlib.Path,
    calls: Sequence[Call] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Makes the calls in `folder`; returns how many there were, and the failures.

    Returns:
      {"tried": n, "refused": n, "tracebacks": [...], "hangs": [...], "partial": [...],
      "sentences": [...]}, each list of (call, details).
    """
    runner = Runner(folder)
    wrong: dict[str, list] = {
        "traceback": [],
        "hang": [],
        "partial": [],
        "sentence": [],
    }
    refused = 0
    calls = make_calls() if calls is None else calls
    for call in calls:
        started = time.monotonic()
        outcome = runner(call)
        refused += outcome.status == 2
        if outcome.fault:
            wrong[outcome.fault].append((str(call), outcome.details))
        if say is not None:
            seconds = time.monotonic() - started
            words = outcome.fault or outcome.error.rstrip("\n").rpartition("\n")[2]
            say(f"{seconds:5.1f} s  {outcome.status}  {call}  {words}")
    return {
        "tried": len(calls),
        "refused": refused,
        "tracebacks": wrong["traceback"],
        "hangs": wrong["hang"],
        "partial": wrong["partial"],
        "sentences": wrong["sentence"],
    }


if __name__ == "__main__":
    found = run_odd_calls(pathlib.Path(sys.argv[1]), say=print)
    print(json.dumps(found, indent=1))
