"""generate, caption, infill, edit, classify: tasks of a work directory.

Every command prints its result and the documents used; with `--json`, one line of JSON.
Images have the same record in a file next to them, and inside the PNG.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands import generate_flags
from racm3_jax.commands.outputs import (
    check_outputs,
    explain_sheet,
    report,
    save_images,
    save_parts,
    show_progress,
)
from racm3_jax.commands.support import KEY as EXAMPLES_KEY

Arguments = argparse.Namespace


def register(commands: Any) -> None:
    """Adds them to the parser's subcommands."""
    for name, command in (
        ("generate", _generate),
        ("caption", _caption),
        ("infill", _infill),
        ("edit", _edit),
        ("classify", _classify),
    ):
        sub = generate_flags.add_command(commands, name)
        sub.set_defaults(command=functools.partial(_check_and_run, command))


def _check_and_run(command: Callable, arguments: Arguments) -> None:
    """Checks the options before a model is loaded."""
    from racm3_jax.generation.settings import SamplingSettings, make_config

    settings: Any = {
        name: value
        for name in SamplingSettings.__annotations__
        if (value := getattr(arguments, name, None)) is not None
    }
    wanted = make_config(settings)
    free = next((n for n in ("text", "parts") if getattr(arguments, n, None)), None)
    if free and wanted.needs_unconditional and not wanted.guide_documents:
        raise ValueError(
            f"--{free} has no prompt to guide away from: add --guide_documents, or leave "
            "--guidance and --contrastive_k out"
        )
    if free and arguments.attribute:
        raise ValueError(
            f"--attribute is for images and captions: remove it, or --{free}"
        )
    if command is not _classify:
        writes_out = hasattr(arguments, "out") and not getattr(arguments, "text", None)
        check_outputs(arguments, writes_out)
    command(arguments)


def _generate(arguments: Arguments) -> None:
    documents = _documents(arguments)
    if arguments.num_neighbours and (documents is None or arguments.parts is not None):
        raise ValueError(
            "--num_neighbours adds documents similar to those of --document: give "
            "--prompt and --document, or remove it"
        )
    if arguments.parts is not None:
        if arguments.preview:
            raise ValueError("--parts writes texts, too: remove --preview")
        parts = _read_parts(Path(arguments.parts))
        generator = _open(arguments)
        output = generator.generate(
            parts,
            documents=documents,
            num_retrieved=arguments.num_retrieved,
            max_segments=arguments.max_segments,
            **_sampling(arguments),
        )
        report(arguments, output, {"written": save_parts(arguments.out, output)})
        return
    generator = _open(arguments)
    common = _sampling(arguments) | {
        "rank_by": arguments.rank_by,
        "on_progress": show_progress(generator, arguments.preview),
    }
    if documents is None:
        output = generator.text_to_image(
            arguments.prompt, num_retrieved=arguments.num_retrieved, **common
        )
    else:
        output = generator.continue_(
            arguments.prompt,
            documents,
            num_neighbours=arguments.num_neighbours,
            **common,
        )
    _attribute(arguments, generator, output)
    save_images(arguments, output)


def _caption(arguments: Arguments) -> None:
    from racm3_jax.documents.images import read_image

    image = read_image(arguments.image)
    arguments.notes = (explain_sheet(arguments.image),)
    documents = _documents(arguments)
    generator = _open(arguments)
    output = generator.caption(
        image,
        documents=documents,
        num_retrieved=arguments.num_retrieved,
        prefix=arguments.prefix,
        caption_prompt=arguments.caption_prompt,
        num_candidates=arguments.num_candidates,
        image_first=arguments.image_first,
        **_sampling(arguments),
    )
    _attribute(arguments, generator, output)
    report(arguments, output, {"captions": output.texts})


def _infill(arguments: Arguments) -> None:
    from racm3_jax.documents.images import read_image

    if arguments.image is None and arguments.text is None:
        raise ValueError("infill needs --image with --box or --mask, or --text")
    image = None if arguments.image is None else read_image(arguments.image)
    documents = _documents(arguments)
    common: dict[str, Any] = {
        "documents": documents,
        "num_retrieved": arguments.num_retrieved,
    }
    if arguments.text is not None:
        if arguments.box or arguments.mask:
            raise ValueError("--text fills in words: remove --box and --mask")
        if arguments.rank_by == "document":
            raise ValueError("--text writes no image: remove --rank_by=document")
        if arguments.preview:
            raise ValueError("--text writes no image: remove --preview")
        if arguments.draft != "auto":
            raise ValueError("--text writes no image: remove --draft")
        output = _open(arguments).infill_text(
            arguments.text, image, **common, **_sampling(arguments)
        )
        report(arguments, output, {"captions": output.texts})
        return
    region = _read_region(arguments)
    generator = _open(arguments)
    output = generator.infill(
        image,
        region,
        arguments.prompt,
        max_spans=arguments.max_spans,
        region_prompt=arguments.region_prompt,
        rank_by=arguments.rank_by,
        on_progress=show_progress(generator, arguments.preview),
        **common,
        **_sampling(arguments),
    )
    _attribute(arguments, generator, output)
    save_images(arguments, output)


def _edit(arguments: Arguments) -> None:
    from racm3_jax.documents.images import read_image

    image, region = read_image(arguments.image), _read_region(arguments)
    documents = _documents(arguments)
    generator = _open(arguments)
    output = generator.edit(
        image,
        region,
        documents,
        arguments.prompt,
        max_spans=arguments.max_spans,
        region_prompt=arguments.region_prompt,
        num_neighbours=arguments.num_neighbours,
        rank_by=arguments.rank_by,
        on_progress=show_progress(generator, arguments.preview),
        **_sampling(arguments),
    )
    _attribute(arguments, generator, output)
    save_images(arguments, output)


def _classify(arguments: Arguments) -> None:
    from racm3_jax.documents.images import read_image

    arguments.memory = None
    image = read_image(arguments.image)
    path = Path(arguments.support)
    support = [
        (read_image(_beside(path, entry["image"])), str(entry["label"]))
        for entry in _read_list(path, {"image", "label"})
    ]
    labels = arguments.labels.split(",") if arguments.labels else None
    found = _open(arguments).classify(
        image,
        support,
        labels,
        shots_per_pass=arguments.shots_per_pass,
        by=arguments.by,
    )
    probabilities = {
        label: round(float(p), 4)
        for label, p in zip(found.labels, found.probabilities, strict=True)
    }
    if arguments.json:
        record = {"label": found.label, "probabilities": probabilities}
        print(json.dumps(record | {"passes": found.num_passes}))
        return
    print(found.label)
    for label, probability in probabilities.items():
        print(f"  {label} {probability:.3f}")


def _attribute(arguments: Arguments, generator: Any, output: Any) -> None:
    """Notes what each document contributed, for the record, if it is asked for."""
    if arguments.attribute:
        arguments.bits = generator.attribute(output)


def _open(arguments: Arguments) -> Any:
    from racm3_jax import run
    from racm3_jax.sharding import current_platform

    if arguments.int8 and current_platform() == "cpu":
        raise ValueError(
            "--int8 is for accelerators: on a CPU, 8-bit weights are not faster than "
            "32-bit ones; remove it"
        )
    if arguments.compilation_cache:
        import jax

        folder = str(Path(arguments.compilation_cache).resolve())
        jax.config.update("jax_compilation_cache_dir", folder)
    mesh = None
    if arguments.tensor is not None:
        import jax

        from racm3_jax import sharding

        devices = jax.local_devices()
        mesh = sharding.make_mesh(tensor=arguments.tensor, devices=devices)
    memory = options.local_memory(arguments)
    generator = run.load(arguments.workdir, memory=memory, mesh=mesh)
    if generator.retriever is not None and getattr(arguments, "num_retrieved", 0):
        from racm3_jax.retrieval.mismatch import explain_mismatch

        mismatch = explain_mismatch(
            generator.retriever.memory, generator.tokenizer, generator.embedder
        )
        arguments.notes = (*getattr(arguments, "notes", ()), mismatch)
    return generator.quantized() if arguments.int8 else generator


def _sampling(arguments: Arguments) -> dict[str, Any]:
    """The sampling settings of the command, by name."""
    from racm3_jax.generation.settings import SamplingSettings

    names = {"num_samples", "seed", *SamplingSettings.__annotations__}
    return {
        name: value
        for name, value in vars(arguments).items()
        if name in names and value is not None
    }


def _documents(arguments: Arguments) -> list[Any] | None:
    """Hand-picked documents from image files and captions."""
    from racm3_jax.documents.images import read_image
    from racm3_jax.types import Document, Segment

    if arguments.document is None:
        return None
    return [
        Document(path, (Segment(text=caption), Segment(image=read_image(path))))
        for path, caption in arguments.document
    ]


def _read_region(arguments: Arguments) -> Any:
    from racm3_jax.documents.images import read_image

    if bool(arguments.box) == bool(arguments.mask):
        raise ValueError("give the region as --box=left,top,right,bottom or as --mask")
    if arguments.mask:
        return read_image(arguments.mask).mean(-1) >= 128
    try:
        left, top, right, bottom = map(int, arguments.box.split(","))
    except ValueError:
        raise ValueError(
            f"--box is {arguments.box!r}; write left,top,right,bottom in pixels, as in "
            "--box=32,0,64,64"
        ) from None
    return left, top, right, bottom


def _read_list(path: Path, *forms: set[str]) -> list[dict[str, Any]]:
    """A JSON list of objects, each with all the keys of one of the forms."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(entries, dict):  # a record of `racm3 support`
        entries = entries.get(EXAMPLES_KEY)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and any(keys <= entry.keys() for keys in forms)
        for entry in entries
    ):
        allowed = " or ".join(", ".join(sorted(keys)) for keys in forms)
        raise ValueError(f"{path} must be a JSON list of objects with {allowed}")
    for i, entry in enumerate(entries):
        for key in set().union(*forms) & entry.keys() - {"label"}:
            if not isinstance(entry[key], str) or not entry[key]:
                raise ValueError(
                    f"{path}: {key} of entry {i} is {entry[key]!r}; give a text"
                )
    return entries


def _beside(path: Path, name: str) -> Path:
    """A path in a file: relative to the file's folder, or to the home folder."""
    return path.parent / Path(name).expanduser()


def _read_parts(path: Path) -> list[Any]:
    from racm3_jax.documents.images import read_image

    return [
        entry["text"] if "text" in entry else read_image(_beside(path, entry["image"]))
        for entry in _read_list(path, {"text"}, {"image"})
    ]
