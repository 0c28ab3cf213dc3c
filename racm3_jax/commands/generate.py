"""generate, caption, infill, edit, classify: tasks of a work directory.

Every command prints its result and the documents used; with `--json`, one line of JSON.
Images have the same record in a file next to them, and inside the PNG.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from racm3_jax.commands import arguments as options
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
    _register_generate(commands)
    _register_caption(commands)
    _register_regions(commands)
    _register_classify(commands)


def _register_generate(commands: Any) -> None:
    sub = _add(commands, "generate", _generate, "Generate images from a prompt.")
    given = sub.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", type=options.non_empty, help="what to generate")
    given.add_argument(
        "--parts",
        type=options.path,
        help='a JSON file, [{"text": ...}, {"image": file}, ...], to continue freely',
    )
    _add_retrieval(sub, "instead of retrieved ones, as demonstrations")
    _add_neighbours(sub)
    _add_sampling(sub)
    _add_ranking(sub)
    _add_preview(sub)
    sub.add_argument(
        "--max_segments",
        type=options.integer(1, 1000),
        default=2,
        help="with --parts: maximum number of generated texts and images",
    )
    sub.add_argument(
        "--out", type=options.path, default="sample.png", help="PNG file to write"
    )
    _add_scale(sub)


def _register_caption(commands: Any) -> None:
    sub = _add(commands, "caption", _caption, "Describe an image.")
    sub.add_argument("--image", type=options.path, required=True, help="image file")
    sub.add_argument(
        "--prefix", default="", help='beginning of the caption, e.g. "Photo of"'
    )
    sub.add_argument(
        "--caption_prompt",
        choices=("masked", "last"),
        default="masked",
        help="masked: mask before the image; last: for models with images first",
    )
    _add_retrieval(sub, "instead of retrieved ones")
    sub.add_argument(
        "--num_candidates",
        type=options.integer(),
        default=None,
        help="retrieve this many, keep the --num_retrieved that explain the image best; 0 "
        f"keeps what is found ({_MEASURED}, else 0)",
    )
    sub.add_argument(
        "--image_first",
        action="store_true",
        default=None,
        help="show documents with their images in front of their texts, to models that "
        f"were trained so ({_MEASURED}, else not)",
    )
    _add_sampling(sub, measured=True)


def _register_regions(commands: Any) -> None:
    sub = _add(
        commands, "infill", _infill, "Fill in a region of an image, or a gap in a text."
    )
    sub.add_argument("--image", type=options.path, help="image file")
    sub.add_argument(
        "--text",
        type=options.non_empty,
        help='text with a gap, e.g. "the flag of <mask> on the moon"',
    )
    _add_region(sub)
    _add_retrieval(sub, "instead of retrieved ones")
    _add_sampling(sub)
    _add_ranking(sub)

    sub = _add(
        commands, "edit", _edit, "Fill in a region, guided by a chosen document."
    )
    sub.add_argument("--image", type=options.path, required=True, help="image file")
    _add_region(sub)
    options.add_memory(sub)
    _add_documents(sub, "the document to follow", required=True)
    _add_neighbours(sub)
    _add_sampling(sub)
    _add_ranking(sub)


def _register_classify(commands: Any) -> None:
    sub = _add(commands, "classify", _classify, "Choose a label by few-shot examples.")
    sub.add_argument("--image", type=options.path, required=True, help="image file")
    sub.add_argument(
        "--support",
        type=options.path,
        required=True,
        help='JSON file of racm3 support, or [{"image": file, "label": ...}]',
    )
    sub.add_argument(
        "--labels",
        type=options.non_empty,
        help="separated by commas; default: those of --support",
    )
    sub.add_argument(
        "--shots_per_pass",
        type=options.integer(1),
        default=None,
        help="examples per label in the context; default: as many as fit",
    )
    sub.add_argument(
        "--by",
        choices=("image", "label"),
        default="image",
        help="compare likelihoods of the image given each label, or of labels given it",
    )


def _add(commands: Any, name: str, command: Callable, text: str) -> Any:
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(command=lambda arguments: _check_and_run(command, arguments))
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="of quickstart or train"
    )
    sub.add_argument("--json", action="store_true", help="one line of JSON")
    sub.add_argument(
        "--compilation_cache",
        type=options.path,
        help="folder of the compilation cache",
    )
    sub.add_argument("--int8", action="store_true", help="8-bit weights")
    sub.add_argument(
        "--tensor",
        type=options.integer(1, 10_000),
        help="tensor-parallel devices per copy of the model; default: as few as fit",
    )
    return sub


def _add_documents(sub: Any, text: str, required: bool = False) -> None:
    sub.add_argument(
        "--document",
        nargs=2,
        action="append",
        metavar=("IMAGE", "CAPTION"),
        required=required,
        help=text,
    )


def _add_retrieval(sub: Any, text: str) -> None:
    options.add_memory(sub)
    sub.add_argument(
        "--num_retrieved",
        type=options.integer(0, 10_000),
        default=2,
        help="number of retrieved documents",
    )
    _add_documents(sub, text)


def _add_neighbours(sub: Any) -> None:
    sub.add_argument(
        "--num_neighbours",
        type=options.integer(0, 10_000),
        default=0,
        help="number of nearest documents to --document, added after it",
    )


# Of the options of `caption` that weights may have their own defaults for.
_MEASURED = "default: what was measured best with the weights"


def _add_sampling(sub: Any, measured: bool = False) -> None:
    """With `measured`, options left out are the weights' own where they have them."""

    def own(value: Any) -> dict[str, Any]:
        return {"default": None if measured else value}

    def explain(text: str, value: Any) -> str:
        return f"{text} ({_MEASURED}, else {value})" if measured else text

    sub.add_argument(
        "--num_samples",
        type=options.integer(1, 10_000),
        default=1,
        help="number of samples",
    )
    sub.add_argument(
        "--seed",
        type=options.integer(0, options.MAX_SEED),
        default=0,
        help="the same seed gives the same samples",
    )
    sub.add_argument(
        "--temperature",
        type=options.number(),
        help=explain("softmax temperature; 0 is greedy decoding", 1.0),
        **own(1.0),
    )
    sub.add_argument(
        "--top_p",
        type=options.number(0, 1),
        default=0.9,
        help="nucleus sampling: probability mass of the kept tokens",
    )
    sub.add_argument(
        "--top_k",
        type=options.integer(),
        default=0,
        help="number of the most probable tokens that are kept; 0 keeps all",
    )
    sub.add_argument(
        "--min_p",
        type=options.number(0, 1),
        default=0.0,
        help="drops tokens below this fraction of the largest probability; 0 keeps all",
    )
    sub.add_argument(
        "--guidance",
        type=options.number(),
        help=explain("1 is none", 1.0),
        **own(1.0),
    )
    sub.add_argument(
        "--contrastive_k", type=options.integer(), default=0, help="0 is none"
    )
    sub.add_argument(
        "--contrastive_alpha",
        type=options.number(0, 1),
        default=0.6,
        help="with --contrastive_k: smallest probability, as a fraction of the k-th largest",
    )
    sub.add_argument(
        "--guide_documents",
        action="store_true",
        help=explain(
            "classifier-free guidance also against generation without the documents",
            "not",
        ),
        **own(False),
    )
    sub.add_argument(
        "--attribute",
        action="store_true",
        help="also measure by how many bits each document makes the best sample likelier",
    )


def _add_ranking(sub: Any) -> None:
    sub.add_argument(
        "--draft",
        choices=("auto", "off", "table", "jacobi"),
        default="auto",
        help="speculative decoding of image codes: by a table of counts over the "
        "memory, by the previous pass (Jacobi), or off; auto is the fastest; the images "
        "are the same",
    )
    sub.add_argument(
        "--rank_by",
        choices=("auto", "clip", "document", "likelihood"),
        default="auto",
        help="rank the samples by similarity to the prompt (clip), similarity to the "
        "first document, or likelihood; auto is clip if it was measured to align texts "
        "with images, else likelihood",
    )


def _add_preview(sub: Any) -> None:
    sub.add_argument(
        "--preview",
        type=options.path,
        help="PNG file, updated while the image is generated",
    )


def _add_scale(sub: Any) -> None:
    sub.add_argument(
        "--scale",
        type=options.integer(1, 16),
        default=1,
        help="scale factor of the written images",
    )


def _add_region(sub: Any) -> None:
    _add_preview(sub)
    sub.add_argument(
        "--box", type=options.non_empty, help="left,top,right,bottom in pixels"
    )
    sub.add_argument(
        "--mask",
        type=options.path,
        help="image file of the same size, white where to fill in",
    )
    sub.add_argument("--prompt", default="", help="the caption of the image, if any")
    sub.add_argument(
        "--max_spans",
        type=options.integer(1, 10_000),
        default=1,
        help="maximum number of masks for the region",
    )
    sub.add_argument(
        "--region_prompt",
        choices=("masked", "in_place"),
        default="masked",
        help="masked: the image with a mask in the region; in_place: the image up to it",
    )
    sub.add_argument(
        "--out", type=options.path, default="sample.png", help="PNG file to write"
    )
    _add_scale(sub)


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
