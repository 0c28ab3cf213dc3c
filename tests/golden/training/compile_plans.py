"""Compiles training steps at full size for absent machines; references of `estimate`.

    python tests/golden/training/compile_plans.py FILE.json [NAME...]

Needs racm3_jax[tpu-compile,gpu-compile]; a TPU's compiler takes 60 to 100 seconds of one
core for each case, a GPU's 10 to 15. Cases that are in the file already are kept; give
their names to compile them again.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent.parent
SMALLER = ("model.d_model=1024", "model.num_layers=24", "model.num_heads=8")
CASES: dict[str, tuple[str, ...]] = {
    "v5p_64": ("--device=v5p:64",),
    "v5p_64_dots": ("--device=v5p:64", "model.remat=dots"),
    "v5p_16_tensor_4": (
        *("--device=v5p:16", "mesh.tensor=4", "model.remat=full", "pipeline.rows=16"),
    ),
    "v5e_64": ("--device=v5e:64", "model.remat=full"),
    "v5e_2x64": ("--device=v5e:64", "--slices=2", "model.remat=full"),
    "v6e_64": ("--device=v6e:64", "model.remat=full"),
    "h100_8": ("--device=h100:8", "model.remat=full", "pipeline.rows=16"),
    "h100_8_none": ("--device=h100:8", "pipeline.rows=8"),
    "h100_8_dots": ("--device=h100:8", "model.remat=dots", "pipeline.rows=16"),
    "h100_8_tensor_2": (
        *("--device=h100:8", "mesh.tensor=2", "model.remat=full", "pipeline.rows=8"),
    ),
    "h100_8_parts": (
        *("--device=h100:8", "train.num_microbatches=2", "model.remat=full"),
        "pipeline.rows=32",
    ),
    "h100_8_350m": (
        *("--device=h100:8", *SMALLER, "model.d_ff=4096", "pipeline.rows=16"),
    ),
    "h200_1_350m": (
        *("--device=h200:1", *SMALLER, "model.d_ff=2816", "model.activation=swiglu"),
        *("model.remat=dots", "pipeline.rows=4"),
    ),
}


def arguments_of(name: str) -> list[str]:
    """Of `racm3 estimate` without --compile."""
    return [
        f"--config={ROOT}/configs/racm3_2b7.py",
        *(x if x.startswith("--") else f"--config.{x}" for x in CASES[name]),
    ]


def compile_case(name: str) -> dict[str, object]:
    """The compiler's report of one case."""
    command = [sys.executable, "-m", "racm3_jax.cli", "estimate", *arguments_of(name)]
    done = subprocess.run(
        [*command, "--compile", "--max_compiles=1", "--json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    )
    return keep(json.loads(done.stdout)["compiled"])


def keep(found: dict) -> dict[str, object]:
    """The figures of a case that are stored."""
    (part,) = found["parts"]
    return {
        "device": f"{found['device']}:{found['topology']}",
        "mesh": found["facts"]["mesh"],
        "rows": found["size"],
        **{n: part[n] for n in ("argument_bytes", "temporary_bytes", "peak_bytes")},
        "wire_bytes": round(part["wire_bytes"]),
        "collectives": {
            kind: {n: c[n] for n in ("count", "asynchronous_count")}
            for kind, c in part["collectives"].items()
        },
    }


def main(file: str, names: list[str]) -> None:
    path = pathlib.Path(file)
    stored = json.loads(path.read_text()) if path.exists() else {}
    for name in CASES:
        if name in names or (not names and name not in stored):
            stored[name] = compile_case(name)
            path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
