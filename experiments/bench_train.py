"""Benchmark: the training step vs. torch, and the gain of packing.

    python experiments/bench_train.py --part=cpu --out=bench        # needs torch
    python experiments/bench_train.py --part=packing --out=bench
    python experiments/bench_train.py --part=compile --out=bench
    python experiments/bench_train.py --part=gpu --out=bench        # one GPU, needs torch

cpu      27M parameters, 2 rows of 512, all cores: our step, torch float32 and torch
         bfloat16 autocast, each in its own process, in turns, on an idle machine;
         medians, fastest and ratios, then the parts of our step.
packing  fill and useful tokens per row at K ~ U{0,1,2}, 1024 tokens per image, captions
of
         about 30, rows of 4096; one example per row, best fit, best fit with
         truncation.
compile  seconds to compile the step of configs/flagworld_tiny.py, without any cache.
gpu      the paper's 2.7B at 4096: our step (packed rows, cuDNN) vs. torch.compile with
         flash attention, each in its own process, at most 8 minutes in total.
         Imports jax, flax, optax, numpy and torch only. --tiny tries its code on a CPU.

Each part adds to `bench_train.json` in --out and prints a table. `python
experiments/speed_table.py` makes the table of results/README.md from the record in
results/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_sides
import numpy as np

CPU_SIDES = ("ours, bfloat16", "torch, float32", "torch, bfloat16 autocast")
GPU_SIDES = ("ours", "torch")
# Seconds: limits of `gpu`, and of one side of it.
GPU_LIMIT = 460


def make_rows(
    vocab_size: int, rows: int, length: int, num_segments: int
) -> dict[str, np.ndarray]:
    """Random tokens in rows of several examples, without padding."""
    rng = np.random.default_rng(0)
    edges = np.linspace(0, length, num_segments + 1).astype(int)
    segment = np.searchsorted(edges, np.arange(length), side="right")
    positions = np.arange(length) - edges[segment - 1]
    ids = rng.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    return {
        "inputs": ids[:, :-1].copy(),
        "targets": ids[:, 1:].copy(),
        "loss_weights": np.ones((rows, length), np.float32),
        "segment_ids": np.tile(segment.astype(np.int32), (rows, 1)),
        "positions": np.tile(positions.astype(np.int32), (rows, 1)),
        "is_main": np.ones((rows, length), bool),
    }


class Ours:
    """This package's training step, as `racm3 train` builds it."""

    def __init__(self, config: Any, batch: dict[str, np.ndarray], z_loss: float = 0.0):
        import jax

        from racm3_jax import sharding
        from racm3_jax.model.transformer import Transformer, head_weights, init_params
        from racm3_jax.training.loss import GeneratorLossConfig, make_generator_loss
        from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
        from racm3_jax.training.step import init_state, make_train_step
        from racm3_jax.types import Batch
        from racm3_jax.vocab import Vocab

        codes = config.vocab_size // 8
        vocab = Vocab(config.vocab_size - codes - 20, codes, 16, 16)
        self.mesh = sharding.make_mesh()
        self.optimizer = build_optimizer(OptimizerConfig(num_steps=10**6))
        model: Any = Transformer(config)
        self.state = init_state(
            lambda key: init_params(config, key, boxed=True),
            self.optimizer,
            self.mesh,
            jax.random.key(0),
        )
        self.loss_fn = make_generator_loss(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            lambda params: head_weights(params, config),
            vocab,
            GeneratorLossConfig(z_loss=z_loss),
        )
        self.step_fn = make_train_step(
            self.loss_fn, self.optimizer, self.mesh, self.state
        )
        self.batch = self.step_fn.put_batch(Batch(**batch))

    def step(self) -> float:
        """One training step; its seconds."""
        import jax

        start = time.perf_counter()
        self.state, metrics = self.step_fn(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def show(results: dict[str, Any]) -> None:
    """Prints the results so far, for interrupted runs."""
    print(format_results(results), file=sys.stderr, flush=True)


def cpu_case(tiny: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """(model, batch) of `cpu`."""
    from racm3_jax.model.config import ModelConfig

    sizes = (32, 2, 2, 16, 64, 64) if tiny else (512, 8, 8, 64, 2048, 4096)
    width, layers, heads, head_dim, d_ff, vocab_size = sizes
    rows, length = (2, 64) if tiny else (2, 512)
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        d_ff=d_ff,
        max_length=length,
        activation="relu",
        compute_dtype="bfloat16",
    )
    return config, make_rows(vocab_size, rows, length, num_segments=1)


def run_cpu_side(side: str, tiny: bool) -> None:
    """One side of `cpu`, in this process: steps, and ours by parts."""
    from racm3_jax.training.host import keep_freed_memory

    # Both sides keep freed memory for the next step, as `racm3 train` does.
    keep_freed_memory()
    config, batch = cpu_case(tiny)
    if side == CPU_SIDES[0]:
        from bench_parts import time_parts

        ours = Ours(config, batch)

        def answer(request: Any) -> Any:
            if request == "step":
                return ours.step()
            return time_parts(ours, config, request["parts"])

    else:
        import torch
        from bench_torch import make_torch_step

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        ids = batch["inputs"], batch["targets"]
        half = side == CPU_SIDES[2]
        step = make_torch_step(config, *ids, half=half, compiled=False, device="cpu")

        def answer(request: Any) -> Any:
            assert request == "step"
            return step()

    bench_sides.serve(answer)


def run_cpu(repeats: int, tiny: bool, load: float) -> dict[str, Any]:
    """Steps of the three sides in turns, after two of each; then parts of ours."""
    from racm3_jax.model.transformer import abstract_params, count_params

    config, batch = cpu_case(tiny)
    rows, length = batch["inputs"].shape
    cores = sorted(os.sched_getaffinity(0))
    command = [__file__, "--part=side", *(["--tiny"] if tiny else [])]
    sides = [
        bench_sides.Side(name, [*command, f"--side={name}"], cores)
        for name in CPU_SIDES
    ]
    first = bench_sides.ask_in_turns(sides, "step", 1)
    bench_sides.ask_in_turns(sides, "step", 1)
    found = bench_sides.summarise(bench_sides.ask_in_turns(sides, "step", repeats))
    medians = found["median_seconds"]
    results = {
        "parameters": count_params(abstract_params(config)),
        "rows": rows,
        "length": length,
        "repeats": repeats,
        "cores": len(cores),
        "load_at_start": load,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "torch")},
        "first_step_seconds": first[CPU_SIDES[0]][0],
        **found,
        "tokens_per_second": {n: rows * length / s for n, s in medians.items()},
    }
    show(results)
    results["parts_seconds"] = sides[0].ask({"parts": max(3, repeats // 3)})
    for side in sides:
        side.close()
    return results


def run_compile() -> dict[str, Any]:
    """Tracing and XLA compilation of the smallest config: wall-clock and CPU time."""
    import jax

    from racm3_jax import wiring
    from racm3_jax.commands.configs import find_config, read_config

    config = read_config([], find_config("flagworld_tiny.py"))
    model_config, _ = wiring.build_model_shape(config)
    rows, length = config.pipeline.rows, config.pipeline.row_length
    batch = make_rows(model_config.vocab_size, rows, length, num_segments=2)
    jax.config.update("jax_enable_compilation_cache", False)
    ours = Ours(model_config, batch)
    clock, cores = time.perf_counter(), time.process_time()
    with jax.set_mesh(ours.mesh):
        compiled: Any = ours.step_fn.compiled
        compiled.lower(ours.state, ours.batch).compile()
    return {
        "seconds": time.perf_counter() - clock,
        "core_seconds": time.process_time() - cores,
    }


def run_packing(tiny: bool) -> dict[str, Any]:
    """See bench_packing.py, which `gpu` does not import."""
    import bench_packing

    sizes = {8: 1} if tiny else {32: 12, 256: 4}
    return {
        f"{rows} rows": bench_packing.run_packing(rows, num_batches)
        for rows, num_batches in sizes.items()
    }


def gpu_config(tiny: bool) -> tuple[Any, int]:
    """(model, length of a row)"""
    from racm3_jax.model import config as configs

    if tiny:
        return configs.tiny(compute_dtype="bfloat16", scan_layers=True), 64
    return configs.racm3_2b7(max_segments=4), 4096


def run_gpu_side(side: str, rows: int, tiny: bool, repeats: int) -> dict[str, Any]:
    """One side of `gpu`, in this process."""
    config, length = gpu_config(tiny)
    # Two examples per row, the average of packing.
    batch = make_rows(config.vocab_size, rows, length, num_segments=2)
    start = time.perf_counter()
    if side == "ours":
        import jax

        step = Ours(config, batch).step
        device = jax.devices()[0].device_kind
    else:
        import torch
        from bench_torch import make_torch_step

        where = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.cuda.get_device_name() if where == "cuda" else "cpu"
        torch.set_float32_matmul_precision("high")
        step = make_torch_step(
            config,
            batch["inputs"],
            batch["targets"],
            half=True,
            compiled=where == "cuda",
            device=where,
        )
    step()
    compiled = time.perf_counter() - start
    step()
    seconds = statistics.median(step() for _ in range(repeats))
    result = {
        "device": device,
        "rows": rows,
        "seconds_to_first_step": compiled,
        "median_seconds": seconds,
        "tokens_per_second": rows * length / seconds,
    }
    if side == "ours":
        import jax

        from racm3_jax.model.transformer import abstract_params, count_params
        from racm3_jax.training.hardware import find_device, flops_per_token

        result["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use", 0
        )
        if kind := find_device(device):
            count = count_params(abstract_params(config))
            flops = flops_per_token(config, count, length / 2)
            result["mfu_palm"] = result["tokens_per_second"] * flops / kind.flops
    else:
        from bench_torch import peak_memory

        result["peak_bytes"] = peak_memory("cpu" if device == "cpu" else "cuda")
    return result


def run_gpu(tiny: bool, repeats: int) -> dict[str, Any]:
    """Both sides, each in its own process; more rows as long as they fit."""
    deadline = time.monotonic() + GPU_LIMIT
    results: dict[str, Any] = {}
    for rows in (2,) if tiny else (2, 4, 6):
        for side in GPU_SIDES:
            last = results.get(f"{side}, {rows - 2} rows", {})
            left = deadline - time.monotonic()
            if "error" in last or left < 60:
                continue
            command = [sys.executable, __file__, "--part=side", f"--side={side}"]
            command += [f"--rows={rows}", f"--repeats={repeats}"]
            command += ["--tiny"] if tiny else []
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=left, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                found = {"error": f"not finished after {left:.0f} s"}
            except subprocess.CalledProcessError as error:
                lines = [
                    x for x in error.stderr.splitlines() if "Error" in x or "OOM" in x
                ]
                found = {
                    "error": (lines or error.stderr.splitlines() or [""])[-1][:200]
                }
            results[f"{side}, {rows} rows"] = found
            print(f"{side}, {rows} rows: {found}", file=sys.stderr, flush=True)
    speeds = {
        side: max(
            (r.get("tokens_per_second", 0.0) for n, r in results.items() if side in n),
            default=0.0,
        )
        for side in GPU_SIDES
    }
    results["best_tokens_per_second"] = speeds
    if speeds["torch"]:
        results["ours_is_faster"] = speeds["ours"] / speeds["torch"]
    return results


def format_results(results: Any, indent: str = "") -> str:
    """Nested results as aligned lines."""
    lines = []
    for name, value in results.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", format_results(value, indent + "  ")]
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            lines.append(f"{indent}{name:<36} {shown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["cpu", "packing", "compile", "gpu", "side"]
    parser.add_argument("--part", required=True, choices=parts)
    parser.add_argument("--out", default="")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="to try the code")
    parser.add_argument("--side", default="ours", choices=[*GPU_SIDES, *CPU_SIDES])
    parser.add_argument("--rows", type=int, default=2)
    bench_sides.add_busy_flag(parser)
    arguments = parser.parse_args()
    repeats, tiny = arguments.repeats, arguments.tiny
    if arguments.part == "side" and arguments.side in CPU_SIDES:
        run_cpu_side(arguments.side, tiny)
        return
    if arguments.part == "side":
        print(json.dumps(run_gpu_side(arguments.side, arguments.rows, tiny, repeats)))
        return
    load = bench_sides.check_load(parser, arguments.busy or tiny)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "cpu": lambda: run_cpu(repeats, tiny, load),
        "packing": lambda: run_packing(tiny),
        "compile": run_compile,
        "gpu": lambda: run_gpu(tiny, repeats),
    }
    results = runs[arguments.part]()
    print(format_results(results))
    if arguments.out:
        path = Path(arguments.out) / "bench_train.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {arguments.part: results}, indent=1))


if __name__ == "__main__":
    main()
