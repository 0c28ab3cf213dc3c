"""convert, export, tokenize: import public weights, export ours, inspect codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from racm3_jax.commands import arguments as options

Arguments = argparse.Namespace


_CONVERT_DETAILS = """

The layout of the source is detected by the names and shapes of its tensors. In a folder
the safetensors are read; .pt, .ckpt and .bin files are read without executing pickles.
Nothing is written unless all tensors match and are finite."""
_CONVERT_EXAMPLES = """examples:
  racm3 convert clip hub:openai/clip-vit-large-patch14 out/clip
  racm3 convert clip ViT-L-14.pt out/clip --merges=bpe_simple_vocab_16e6.txt.gz
  racm3 convert vqgan last.ckpt out/vqgan --image_size=256
  racm3 convert chameleon chameleon-7b out/chameleon --vqgan=vqgan.ckpt \\
      --clip=out/clip --accept_licence"""


def register(commands: Any) -> None:
    """Adds the three to the parser's subcommands."""
    _register_convert(commands)
    _register_export(commands)
    _register_tokenize(commands)


def _register_convert(commands: Any) -> None:
    text = "Convert public weights (CLIP, VQGAN, Chameleon) to our format."
    sub = commands.add_parser(
        "convert",
        help=text,
        description=f"{text} {_CONVERT_DETAILS}",
        epilog=_CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(command=_convert)
    sub.add_argument("kind", choices=["clip", "vqgan", "chameleon"], help="model type")
    sub.add_argument(
        "source",
        type=options.path,
        help="a file, a folder, or hub:owner/name[@revision]",
    )
    sub.add_argument("out", type=options.path, help="new folder")
    sub.add_argument(
        "--merges", type=options.path, help="clip: file of the BPE's merges"
    )
    sub.add_argument(
        "--activation",
        choices=["quick_gelu", "gelu"],
        help="clip: for a file that does not specify it",
    )
    sub.add_argument("--image_size", type=int, help="vqgan, chameleon: side in pixels")
    sub.add_argument(
        "--vqgan", type=options.path, help="chameleon: its image tokenizer"
    )
    sub.add_argument(
        "--clip", type=options.path, help="chameleon: folder of a converted CLIP"
    )
    sub.add_argument(
        "--accept_licence",
        action="store_true",
        help="chameleon: confirm that you accept its licence",
    )
    sub.add_argument("--licence", default="", help="clip, vqgan: for the manifest")
    sub.add_argument(
        "--part",
        help="which weights of a larger checkpoint (keys joined by dots, or a prefix "
        "of the names)",
    )
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it is a folder of the same kind with no other files",
    )


def _register_export(commands: Any) -> None:
    text = "Write a CLIP or a converted Chameleon for other libraries."
    sub = commands.add_parser("export", help=text, description=text)
    sub.set_defaults(command=_export)
    sub.add_argument("source", type=options.path, help="a folder in our format")
    sub.add_argument("out", type=options.path, help="new folder")
    sub.add_argument(
        "--format", choices=["hf"], default="hf", help="hf: for transformers"
    )
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at OUT"
    )


def _register_tokenize(commands: Any) -> None:
    text = "Encode an image to codes; with --roundtrip, decode and measure the PSNR."
    sub = commands.add_parser("tokenize", help=text, description=text)
    sub.set_defaults(command=_tokenize)
    sub.add_argument("image", type=options.path, help="an image file of any size")
    sub.add_argument(
        "--tokenizer",
        type=options.path,
        required=True,
        help="folder of a tokenizer, or its image part (shipped:flagworld/tokenizer is "
        "inside racm3_jax)",
    )
    sub.add_argument(
        "--roundtrip",
        action="store_true",
        help="print the PSNR and write both images side by side",
    )
    sub.add_argument(
        "--out", type=options.path, default="roundtrip.png", help="of --roundtrip"
    )


def _convert(arguments: Arguments) -> None:
    from racm3_jax.porting.files import resolve_source

    _refuse_foreign_options(arguments)
    source = resolve_source(arguments.source)
    for name in ("out", "merges", "vqgan", "clip"):
        if value := getattr(arguments, name):
            setattr(arguments, name, str(Path(value).expanduser()))
    common = {"part": arguments.part, "overwrite": arguments.overwrite}
    if arguments.kind == "clip":
        from racm3_jax.porting.clip import convert_clip

        config: Any = convert_clip(
            source,
            arguments.out,
            merges=arguments.merges,
            activation=arguments.activation,
            licence=arguments.licence,
            **common,
        )
    elif arguments.kind == "vqgan":
        from racm3_jax.porting.vqgan import convert_vqgan

        config = convert_vqgan(
            source,
            arguments.out,
            image_size=arguments.image_size,
            licence=arguments.licence,
            **common,
        )
    else:
        from racm3_jax.porting.chameleon import convert_chameleon

        config = convert_chameleon(
            source,
            arguments.out,
            vqgan=arguments.vqgan,
            clip=arguments.clip,
            accept_licence=arguments.accept_licence,
            image_size=arguments.image_size or 512,
            **common,
        )
    print(f"wrote {arguments.out}: {config}")


_OPTIONS = {
    "clip": {"merges", "activation", "licence"},
    "vqgan": {"image_size", "licence"},
    "chameleon": {"image_size", "vqgan", "clip", "accept_licence"},
}


def _refuse_foreign_options(arguments: Arguments) -> None:
    """Refuses options that have no effect."""
    for name in sorted(set().union(*_OPTIONS.values()) - _OPTIONS[arguments.kind]):
        if getattr(arguments, name):
            raise ValueError(
                f"--{name} has no effect for {arguments.kind}; its options are "
                + ", ".join(f"--{n}" for n in sorted(_OPTIONS[arguments.kind]))
            )


def _export(arguments: Arguments) -> None:
    from racm3_jax.checkpoints import read_config
    from racm3_jax.porting.export import export_hf

    source = Path(arguments.source).expanduser()
    out = Path(arguments.out).expanduser()
    kind = export_hf(source, out, overwrite=arguments.overwrite)
    print(f"wrote {arguments.out}: a {kind} for transformers")
    aligned = 0
    if kind == "clip":
        aligned = read_config(source)["config"].get("aligned_dims", 0)
    if aligned:
        print(
            f"compare texts with images by the first {aligned} numbers of their "
            "embeddings only: transformers compares all of them"
        )


def _tokenize(arguments: Arguments) -> None:
    import numpy as np

    from racm3_jax import own_files, wiring
    from racm3_jax.documents.images import read_image, resize_image
    from racm3_jax.tokenizers.image import ImageTokenizer, compute_psnr

    if arguments.roundtrip:
        change = "give another --out"
        own_files.check_png_paths(
            arguments.out, inputs=[arguments.image], change=change
        )
    folder = wiring.resolve(arguments.tokenizer)
    if (folder / "image").is_dir():
        folder = folder / "image"
    tokenizer = ImageTokenizer.load(folder, batch_size=1)
    image = resize_image(read_image(arguments.image), tokenizer.image_size)[None]
    codes = tokenizer.encode(image)
    if not arguments.roundtrip:
        print(" ".join(map(str, codes[0].tolist())))
        return
    decoded = tokenizer.decode(codes)
    both = np.concatenate([image[0], decoded[0]], axis=1)
    own_files.write_png(arguments.out, both)
    psnr = float(compute_psnr(image, decoded)[0])
    print(
        f"PSNR {psnr:.2f} dB, {len(np.unique(codes))} different codes; "
        f"wrote {arguments.out}"
    )
