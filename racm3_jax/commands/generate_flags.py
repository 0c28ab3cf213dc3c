"""The flags of the commands that ask a model: generate, caption, infill, edit, classify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from racm3_jax.commands import arguments as options


def add_command(commands: Any, name: str) -> Any:
    """The parser of one command."""
    text, add_flags = COMMANDS[name]
    sub = commands.add_parser(name, help=text, description=text)
    sub.add_argument(
        "--workdir",
        type=options.path,
        required=True,
        help="of quickstart or train, or the folder generator of fit",
    )
    sub.add_argument("--json", action="store_true", help="one line of JSON")
    sub.add_argument(
        "--compilation_cache",
        type=options.path,
        help="folder of the compilation cache; default: ~/.cache/racm3/programs",
    )
    sub.add_argument(
        "--int8", action="store_true", help="8-bit weights, on accelerators"
    )
    sub.add_argument(
        "--tensor",
        type=options.integer(1, 10_000),
        help="tensor-parallel devices per copy of the model; default: as few as fit",
    )
    add_flags(sub)
    return sub


def _add_generate(sub: Any) -> None:
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


def _add_caption(sub: Any) -> None:
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
    _add_sampling(sub, ("temperature", "guidance", "guide_documents"))


def _add_infill(sub: Any) -> None:
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


def _add_edit(sub: Any) -> None:
    sub.add_argument("--image", type=options.path, required=True, help="image file")
    _add_region(sub)
    options.add_memory(sub)
    _add_documents(sub, "the document to follow", required=True)
    _add_neighbours(sub)
    _add_sampling(sub)
    _add_ranking(sub)


def _add_classify(sub: Any) -> None:
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


# Of the options that weights may have their own defaults for.
_MEASURED = "default: what was measured best with the weights"


def _add_sampling(sub: Any, measured: Sequence[str] = ("temperature", "top_p")) -> None:
    """Options in `measured` that are left out are the weights' own if they have them."""

    def explain(name: str, text: str, value: Any, shown: str = "") -> dict[str, Any]:
        if name not in measured:
            return {"help": text, "default": value}
        return {
            "help": f"{text} ({_MEASURED}, else {shown or value})",
            "default": None,
        }

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
        **explain("temperature", "softmax temperature; 0 is greedy decoding", 1.0),
    )
    sub.add_argument(
        "--top_p",
        type=options.number(0, 1),
        **explain(
            "top_p", "nucleus sampling: probability mass of the kept tokens", 0.9
        ),
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
        **explain(
            "guidance",
            "weight of classifier-free guidance, from what would be generated without the "
            "prompt; 1 is none",
            1.0,
        ),
    )
    sub.add_argument(
        "--contrastive_k",
        type=options.integer(),
        default=0,
        help="contrastive decoding (CD-K), instead of --guidance: its k; 0 is none",
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
        **explain(
            "guide_documents",
            "classifier-free guidance also against generation without the documents",
            False,
            "not",
        ),
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
        "first document, or likelihood; auto is what was measured best with the weights, "
        "else clip if it was measured to align texts with images, else likelihood",
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
        default=None,
        help="masked: the image with a mask in the region; in_place: the image up to it "
        f"({_MEASURED}, else masked)",
    )
    sub.add_argument(
        "--out", type=options.path, default="sample.png", help="PNG file to write"
    )
    _add_scale(sub)


COMMANDS = {
    "generate": ("Generate images from a prompt.", _add_generate),
    "caption": ("Describe an image.", _add_caption),
    "infill": ("Fill in a region of an image, or a gap in a text.", _add_infill),
    "edit": ("Fill in a region, guided by a chosen document.", _add_edit),
    "classify": ("Choose a label by few-shot examples.", _add_classify),
}
