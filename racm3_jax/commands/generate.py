"""generate, caption: what runs from a work directory."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

Arguments = argparse.Namespace


def register(commands: Any) -> None:
    """Adds them to the parser's subcommands."""
    for name, command, text, needs in (
        ("generate", _generate, "Draw what a prompt says.", "prompt"),
        ("caption", _caption, "Describe an image.", "image"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--workdir", required=True, help="of quickstart or train")
        sub.add_argument(f"--{needs}", required=True)
        sub.add_argument("--memory", default=None, help="another memory directory")
        sub.add_argument("--num_samples", type=int, default=1)
        sub.add_argument("--num_retrieved", type=int, default=2)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--temperature", type=float, default=1.0)
        sub.add_argument("--top_p", type=float, default=0.9)
        sub.add_argument("--json", action="store_true", help="one line of JSON")
        if name == "generate":
            sub.add_argument("--out", default="sample.png")


def _generate(arguments: Arguments) -> None:
    from PIL import Image

    from racm3_jax import run

    generator = run.load(arguments.workdir, memory=arguments.memory)
    output = generator.text_to_image(
        arguments.prompt,
        num_samples=arguments.num_samples,
        num_retrieved=arguments.num_retrieved,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
    from racm3_jax.evaluation.pictures import tile

    picture = tile(output.images)
    Image.fromarray(picture).save(arguments.out)
    _report(arguments, output, {"out": arguments.out})


def _caption(arguments: Arguments) -> None:
    from racm3_jax import run
    from racm3_jax.documents.images import read_image

    image = read_image(arguments.image)
    generator = run.load(arguments.workdir, memory=arguments.memory)
    output = generator.caption(
        image,
        num_samples=arguments.num_samples,
        num_retrieved=arguments.num_retrieved,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
    _report(arguments, output, {"captions": output.texts})


def _report(arguments: Arguments, output: Any, more: dict[str, Any]) -> None:
    """Prints what was made and which documents it was made from."""
    retrieved = [
        {
            "id": document.id,
            "score": _number(score),
            "source": document.source,
            "licence": document.metadata.get("licence", ""),
        }
        for document, score in zip(
            output.retrieved.documents, output.retrieved.scores, strict=True
        )
    ]
    record = {
        "prompt": output.prompt,
        "seed": output.seed,
        "scores": [_number(score) for score in output.scores],
        "retrieved": retrieved,
        **more,
    }
    if arguments.json:
        print(json.dumps(record))
        return
    for caption in more.get("captions", []):
        print(caption)
    if "out" in more:
        print(f"wrote {more['out']}")
    for entry in retrieved:
        print(f"  retrieved {entry['id']} (score {entry['score']:.3f})")


def _number(value: float) -> float | None:
    """JSON has no NaN, which is the score of a document that was picked by hand."""
    return round(float(value), 4) if math.isfinite(value) else None
