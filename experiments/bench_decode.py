"""Benchmark: decoding speed vs. `transformers` and a torch loop, with random weights.

    python experiments/bench_decode.py --shape=small --out=racm3_out/bench_decode
    python experiments/bench_decode.py --shape=2b7 --only_ours --bandwidth=4.8e12

One run, three tables:
  one      batch 1, no documents: new tokens per second
  guided   samples with guidance after a shared prefix of 2 documents: one, and ten
  memory   (with --bandwidth) seconds per image and the fraction of the memory bandwidth
  drafts   (with --memory=DIR, of `racm3 quickstart`) the shipped model and that memory,
           one image at a time, sampled as its weights say: with and without speculative
           decoding, passes, acceptance, equal codes

The other tables are without speculative decoding: random weights accept no drafts. The
machine's load is checked first: above 0.5 comparisons are not meaningful, and --busy is
needed.

Each side is a separate process, on the same cores with the same number of threads; they
alternate, so that all have the same conditions. The peers have this model's
architecture (OPT: learned positions, pre-LayerNorm, ReLU, tied embeddings):
  transformers  `generate` with its dynamic cache, its static one, and that one compiled
  torch loop    a static cache only, head of the codes only; float32, bfloat16
There are two warm-up calls; the medians and the fastest of `--repeats` calls are
written to `bench_decode.json` and `bench_decode.png`. `python experiments/speed_table.py`
makes the table of results/README.md from the record in results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_sides import (
    Side,
    add_busy_flag,
    ask_in_turns,
    check_load,
    serve,
    summarise,
)

from racm3_jax import run as run_lib
from racm3_jax.generation import decoding, text_to_image
from racm3_jax.generation.batching import sample_prompts
from racm3_jax.generation.grammar import image_grammar
from racm3_jax.generation.sample import SamplingConfig, Unconditional, sample
from racm3_jax.generation.settings import make_config
from racm3_jax.model.config import ModelConfig, racm3_2b7
from racm3_jax.model.quantization import quantize_weights
from racm3_jax.model.transformer import (
    Transformer,
    init_params,
    prepare_decoding,
    unstack_layers,
)
from racm3_jax.vocab import Vocab

# The first two are this package.
SIDES = (
    "ours",
    "ours, int8",
    "transformers, dynamic",
    "transformers, static",
    "transformers, compiled",
    "torch loop, float32",
    "torch loop, bfloat16",
)
TABLES = ("one", "guided", "guided samples")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model shape, and the lengths of an image and of a text in tokens."""

    config: ModelConfig
    vocab: Vocab
    text_length: int


def make_case(name: str) -> Case:
    """ "tiny" for tests, "small" for two CPU cores, "2b7" for one GPU."""
    if name == "2b7":
        vocab = Vocab(
            num_text_ids=65_536 - 8_192 - 512 - 4,
            num_image_codes=8_192,
            image_length=1024,
            num_sentinels=512,
        )
        return Case(racm3_2b7(), vocab, text_length=32)
    layers, width, codes = (1, 32, 16) if name == "tiny" else (8, 512, 256)
    vocab = Vocab(
        num_text_ids=64 if name == "tiny" else 8_192 - 1024 - 20,
        num_image_codes=64 if name == "tiny" else 1024,
        image_length=codes,
        num_sentinels=16,
    )
    config = ModelConfig(
        vocab_size=vocab.size,
        d_model=width,
        num_layers=layers,
        num_heads=width // 32,
        head_dim=32,
        d_ff=4 * width,
        max_length=256 if name == "tiny" else 1024,
        activation="relu",
    )
    return Case(config, vocab, text_length=16)


class Ours:
    """This package: one call of `sample` per image."""

    def __init__(self, case: Case) -> None:
        config = case.config
        # Unrolled and cast layer by layer, without a second copy of the weights.
        config = dataclasses.replace(config, scan_layers=False)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

        @jax.jit
        def make(key):
            params = unstack_layers(init_params(config, key))
            return jax.tree.map(lambda x: x.astype(dtype), params)

        self.config, self.params = prepare_decoding(config, make(jax.random.key(0)))
        self.model = Transformer(self.config)
        self.case = case
        self.grammar = image_grammar(case.vocab)

    def make_call(
        self, num_samples: int, num_documents: int, guidance: float
    ) -> Callable[[], Any]:
        """A call that generates images after documents, and waits for them."""
        vocab = self.case.vocab
        prompt, plain = make_prompts(self.case, num_documents)
        shared = np.array([len(plain) - 2])
        settings = SamplingConfig(
            guidance=guidance, max_new_tokens=vocab.image_length, fixed_length=True
        )
        return lambda: sample(
            self.model,
            self.params,
            prompt[None],
            np.array([len(prompt)]),
            self.grammar,
            settings,
            jax.random.key(0),
            num_samples=num_samples,
            prefix_lengths=shared,
            unconditional=Unconditional(plain[None], np.array([len(plain)]), shared),
            token_range=vocab.image_range,
        )

    def bytes_of_a_step(self, num_samples: int, num_documents: int) -> float:
        """Bytes read by one step: weights, the prefix, half-filled caches (guided)."""
        c, vocab = self.config, self.case.vocab
        read = {name: x for name, x in self.params.items() if name != "embedding"}
        weights = sum(x.nbytes for x in jax.tree.leaves(read))
        width = self.params["embedding"].dtype.itemsize
        head = vocab.num_image_codes * c.d_model * width
        a_token = 2 * c.num_layers * c.kv_heads * c.head_dim * width
        prefix = num_documents * (vocab.image_length + self.case.text_length)
        own = 2 * num_samples * (self.case.text_length + vocab.image_length / 2)
        return weights + head + a_token * (prefix + own)


def make_documents(case: Case, count: int, rng: np.random.Generator) -> np.ndarray:
    """`<eod> text <break> image <eod> ...` with random tokens."""
    vocab = case.vocab
    pieces: list[Any] = [[vocab.eod]]
    for _ in range(count):
        pieces.append(rng.integers(0, vocab.num_text_ids, case.text_length))
        codes = rng.integers(0, vocab.num_image_codes, vocab.image_length)
        pieces += [[vocab.break_], vocab.image_tokens(codes), [vocab.eod]]
    return np.concatenate(pieces).astype(np.int32)


def make_prompts(case: Case, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt after documents, and the same with its text masked."""
    vocab, rng = case.vocab, np.random.default_rng(0)
    prefix = make_documents(case, num_documents, rng)
    text = rng.integers(0, vocab.num_text_ids, case.text_length)
    prompt = [*prefix, *text, vocab.break_]
    plain = [*prefix, vocab.sentinel(0), vocab.break_]
    return np.asarray(prompt, np.int32), np.asarray(plain, np.int32)


class Theirs:
    """`transformers` generate on OPT of the same shape, random weights."""

    def __init__(self, case: Case) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import (  # pyright: ignore[reportMissingImports]
            OPTConfig,
            OPTForCausalLM,
        )

        c = case.config
        torch.manual_seed(0)
        self.torch, self.case = torch, case
        self.model = OPTForCausalLM(
            OPTConfig(
                vocab_size=c.vocab_size,
                hidden_size=c.d_model,
                num_hidden_layers=c.num_layers,
                num_attention_heads=c.num_heads,
                ffn_dim=c.d_ff,
                max_position_embeddings=c.max_length,
                word_embed_proj_dim=c.d_model,
                do_layer_norm_before=True,
                activation_function="relu",
                dropout=0.0,
                bos_token_id=case.vocab.eod,
                pad_token_id=case.vocab.pad,
                eos_token_id=case.vocab.eod,
            )
        ).eval()

    def make_call(
        self, num_samples: int, num_documents: int, guidance: float, cache: str
    ) -> Callable[[], Any]:
        """The same call with `cache_implementation=cache`."""
        vocab = self.case.vocab
        tokens, plain = make_prompts(self.case, num_documents)
        options: dict[str, Any] = {
            "do_sample": True,
            "top_k": 0,
            "min_new_tokens": vocab.image_length,
            "max_new_tokens": vocab.image_length,
        }
        if cache != "dynamic":
            options["cache_implementation"] = "static"
        if cache == "static":  # static caches are compiled by default
            options["disable_compile"] = True
        if cache == "compiled":
            from transformers import (  # pyright: ignore[reportMissingImports]
                CompileConfig,
            )

            options["compile_config"] = CompileConfig()
            # By default it compiles on accelerators only.
            options["compile_config"]._compile_all_devices = True

        def repeat(x: np.ndarray) -> Any:
            return self.torch.as_tensor(x)[None].repeat(num_samples, 1)

        if guidance != 1:
            options |= {
                "guidance_scale": guidance,
                "negative_prompt_ids": repeat(plain),
            }

        def run() -> Any:
            with self.torch.inference_mode():
                return self.model.generate(repeat(tokens), **options)

        return run


class TorchLoop:
    """The same model as a plain loop in torch with a static cache."""

    def __init__(self, case: Case, dtype: str) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        self.torch, self.case, self.dtype = torch, case, getattr(torch, dtype)
        c, d = case.config, case.config.d_model

        def make(*shape: int) -> Any:
            return (torch.randn(*shape) * 0.02).to(self.dtype)

        self.embedding, self.positions = make(c.vocab_size, d), make(c.max_length, d)
        self.layers = [
            {
                "qkv": (make(3 * d, d), make(3 * d)),
                "out": (make(d, d), make(d)),
                "up": (make(c.d_ff, d), make(c.d_ff)),
                "down": (make(d, c.d_ff), make(d)),
                "norms": [(make(d) + 1, make(d)) for _ in range(2)],
            }
            for _ in range(c.num_layers)
        ]
        self.norm = (make(d) + 1, make(d))

    def read(self, tokens: Any, caches: list[Any], start: int, visible: Any) -> Any:
        """Reads tokens from `start` on; returns the last hidden state of each row."""
        functional, c = self.torch.nn.functional, self.case.config
        rows, length = tokens.shape
        shape, stop = (rows, length, c.num_heads, c.head_dim), start + length
        x = self.embedding[tokens] + self.positions[start:stop]
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            y = functional.layer_norm(x, x.shape[2:], *layer["norms"][0])
            parts = functional.linear(y, *layer["qkv"]).chunk(3, dim=-1)
            q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
            keys[:, :, start:stop], values[:, :, start:stop] = k, v
            y = functional.scaled_dot_product_attention(
                q,
                keys[:, :, :stop],
                values[:, :, :stop],
                visible[:, :, start:stop, :stop],
            )
            x = x + functional.linear(y.transpose(1, 2).reshape(x.shape), *layer["out"])
            y = functional.layer_norm(x, x.shape[2:], *layer["norms"][1])
            y = functional.linear(
                functional.linear(y, *layer["up"]).relu(), *layer["down"]
            )
            x = x + y
        return functional.layer_norm(x[:, -1], x.shape[2:], *self.norm)

    def make_call(
        self, num_samples: int, num_documents: int, guidance: float
    ) -> Callable[[], Any]:
        """A call that generates images, with both prompts of guidance in one batch."""
        torch, vocab, c = self.torch, self.case.vocab, self.case.config
        first, second = make_prompts(self.case, num_documents)
        prompts = [first] if guidance == 1 else [first, second]
        width, length = max(map(len, prompts)), vocab.image_length
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        seen = torch.zeros(len(prompts), 1, 1, width + length, dtype=torch.bool)
        for i, prompt in enumerate(prompts):  # padded on the left
            tokens[i, width - len(prompt) :] = torch.as_tensor(prompt)
            seen[i, ..., width - len(prompt) :] = True
        causal = torch.ones(width + length, width + length, dtype=torch.bool).tril()
        # Padding attends to itself, so that no softmax is empty.
        visible = (seen & causal) | torch.eye(width + length, dtype=torch.bool)
        visible = visible.repeat_interleave(num_samples, 0)
        tokens = tokens.repeat_interleave(num_samples, 0)
        shape = (len(tokens), c.num_heads, width + length, c.head_dim)
        start, stop = vocab.image_range.start, vocab.image_range.stop

        def run() -> Any:
            with torch.inference_mode():
                caches = [
                    tuple(torch.zeros(shape, dtype=self.dtype) for _ in range(2))
                    for _ in range(c.num_layers)
                ]
                codes, new = [], tokens
                for i in range(length):
                    at = 0 if i == 0 else width + i - 1
                    hidden = self.read(new, caches, at, visible)
                    logits = (hidden @ self.embedding[start:stop].T).float()
                    if len(prompts) == 2:
                        given, other = logits.chunk(2)
                        logits = other + guidance * (given - other)
                    code = torch.multinomial(logits.softmax(-1), 1)
                    codes.append(code)
                    new = (start + code).repeat(len(prompts), 1)
                return torch.cat(codes, 1)

        return run


def time_drafts(memory: Path, repeats: int, guidance: float) -> dict[str, Any]:
    """The shipped model with each source of drafts, alternating, `repeats` prompts."""
    model = run_lib.load("shipped:flagworld", memory=memory)
    assert model.retriever is not None
    held = model.retriever.memory.documents(np.arange(repeats))
    prompts = [model.tokenizer.decode(document).text for document in held]
    retrieved = model.retrieve_for(prompts, 2, None)
    tasks = [text_to_image.make_task(model, [prompt]) for prompt in prompts]
    found: dict[str, list[tuple[float, Any]]] = {"off": [], "table": [], "jacobi": []}
    for i in [0, *range(repeats)]:  # the first one compiles
        for source, taken in found.items():
            config = make_config(
                {"guidance": guidance, "draft": source},  # pyright: ignore
                model.defaults.get("image"),
            )
            started = time.perf_counter()
            samples = sample_prompts(model, tasks[i], [retrieved[i]], [i], config, 1)
            taken.append((time.perf_counter() - started, samples))
    results: dict[str, Any] = {}
    for source, taken in found.items():
        seconds = [value for value, _ in taken[1:]]
        runs = [samples for _, samples in taken[1:]]
        tested = sum(int(s.tested.sum()) for s in runs)
        plain = [samples.tokens for _, samples in found["off"][1:]]
        same = [(s.tokens == p).mean() for s, p in zip(runs, plain, strict=True)]
        results[source] = {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "passes": float(np.mean([s.passes.mean() for s in runs])),
            "acceptance": sum(int(s.accepted.sum()) for s in runs) / max(tested, 1),
            "equal_codes": float(np.mean(same)),
            "window": runs[0].count_drafts(0).window,
        }
    return results


def make_calls(side: str, case: Case) -> Callable[..., Callable[[], Any]]:
    """Image generation of a side: (samples, documents, guidance) -> a call."""
    who, _, how = side.partition(", ")
    if who == "torch loop":
        return TorchLoop(case, how).make_call
    if who == "transformers":
        return functools.partial(Theirs(case).make_call, cache=how)
    ours = Ours(case)
    if how == "int8":
        turned = ours.config.outputs_first
        ours.params = quantize_weights(ours.params, outputs_first=turned)
    return ours.make_call


def run_side(side: str, shape: str) -> None:
    """A side's process: for each requested setting, seconds and programs."""
    if side.startswith(("torch loop", "transformers")):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    make_call = make_calls(side, make_case(shape))
    calls: dict[tuple[int, int, float], Callable[[], Any]] = {}

    def answer(request: Any) -> tuple[float, int]:
        setting = tuple(request)
        if setting not in calls:
            calls[setting] = make_call(*setting)
            calls[setting]()
            calls[setting]()
        compiled, started = count_programs(), time.perf_counter()
        calls[setting]()
        return time.perf_counter() - started, count_programs() - compiled

    serve(answer)


def time_sides(
    sides: Sequence[Side], setting: tuple[int, int, float], repeats: int
) -> dict[str, Any]:
    """Seconds of each side's calls, which alternate for equal conditions."""
    answers = ask_in_turns(sides, setting, repeats)
    found = summarise({k: [x for x, _ in pairs] for k, pairs in answers.items()})
    return {
        "seconds": found["median_seconds"],
        "fastest": found["fastest_seconds"],
        "programs_compiled_after_the_first_call": sum(
            programs for pairs in answers.values() for _, programs in pairs
        ),
    }


def count_programs() -> int:
    """Number of programs of the decode loop compiled so far."""
    programs: tuple[Any, ...] = (
        decoding.read_prompts,
        decoding.init_decode_state,
        decoding.decode_steps,
    )
    return sum(program._cache_size() for program in programs)


def run(
    shape: str,
    *,
    repeats: int = 3,
    num_samples: int = 10,
    only_ours: bool = False,
    bandwidth: float = 0.0,
    memory: Path | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Runs the benchmark; returns what is written as JSON."""
    case = make_case(shape)
    cores = sorted(os.sched_getaffinity(0))[: threads or None]
    length = case.vocab.image_length
    results: dict[str, Any] = {
        "shape": shape,
        "image_length": length,
        "num_samples": num_samples,
        "device": jax.devices()[0].device_kind,
        "cores": len(cores),
        "load_at_start": os.getloadavg()[0],
        "repeats": repeats,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    if not only_ours:
        for library in ("torch", "transformers"):
            results["versions"][library] = importlib.metadata.version(library)
    names = SIDES[:2] if only_ours else SIDES
    command = [__file__, f"--shape={shape}"]
    sides = [Side(name, [*command, f"--side={name}"], cores) for name in names]
    for name, setting in (
        ("one", (1, 0, 1.0)),
        ("guided", (1, 2, 3.0)),
        ("guided samples", (num_samples, 2, 3.0)),
    ):
        found = time_sides(sides, setting, repeats)
        seconds = found["seconds"]
        results[name] = found | {
            "ids_per_second": {k: setting[0] * length / v for k, v in seconds.items()},
            "times_faster": {
                k: v / seconds["ours"] for k, v in seconds.items() if k != "ours"
            },
        }
    if bandwidth:
        seconds = time_sides(sides[:1], (1, 2, 3.0), repeats)["seconds"]["ours"]
        read = Ours(case).bytes_of_a_step(1, 2) * length
        results["memory"] = {
            "seconds_an_image": seconds,
            "bytes_read": read,
            "share_of_bandwidth": read / seconds / bandwidth,
        }
    for side in sides:
        side.close()
    if memory is not None:
        results["drafts"] = {
            name: time_drafts(memory, max(repeats, 8), guidance)
            for name, guidance in (("plain", 1.0), ("guided", 2.0))
        }
    return results


def format_tables(results: dict[str, Any]) -> str:
    """The results as a table."""
    lines = []
    for name in TABLES:
        part = results[name]
        lines += [
            f"| {name} | seconds | fastest | tokens/s | ours is faster |",
            "|---|---|---|---|---|",
        ]
        for who, seconds in part["seconds"].items():
            speed = part["ids_per_second"][who]
            times = part["times_faster"].get(who)
            cell = "" if times is None else f"{times:.2f}x"
            fastest = part["fastest"][who]
            lines.append(
                f"| {who} | {seconds:.3f} | {fastest:.3f} | {speed:.0f} | {cell} |"
            )
        compiled = part["programs_compiled_after_the_first_call"]
        lines.append(f"programs compiled after the first call: {compiled}\n")
    for name, sources in results.get("drafts", {}).items():
        for source, part in sources.items():
            lines.append(
                f"{name}, drafts {source} (window {part['window']}): "
                f"{1e3 * part['seconds']:.1f} ms an image, fastest "
                f"{1e3 * part['fastest']:.1f}; {part['passes']:.1f} passes, acceptance "
                f"{part['acceptance']:.2f}, equal codes {part['equal_codes']:.4f}"
            )
    if "memory" in results:
        memory = results["memory"]
        lines.append(
            f"{memory['seconds_an_image']:.2f} s an image, "
            f"{memory['share_of_bandwidth']:.0%} of the memory bandwidth"
        )
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the JSON and the plot atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(14, 3))
    for axis, name in zip(axes, TABLES, strict=True):
        speeds = results[name]["ids_per_second"]
        axis.barh(list(speeds), list(speeds.values()))
        axis.set_title(name)
        axis.set_xlabel("new tokens per second")
    figure.tight_layout()
    figure.savefig(folder / ".bench_decode.tmp.png")
    plt.close(figure)
    os.replace(folder / ".bench_decode.tmp.png", folder / "bench_decode.png")
    aside = folder / ".bench_decode.json.tmp"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(aside, folder / "bench_decode.json")


def main() -> None:
    """Reads the command line, runs, writes and prints."""
    parser = argparse.ArgumentParser(description="Decoding speed.")
    parser.add_argument("--shape", choices=("tiny", "small", "2b7"), default="small")
    parser.add_argument("--out", type=Path, default=Path("racm3_out/bench_decode"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--only_ours", action="store_true", help="without transformers")
    parser.add_argument(
        "--bandwidth", type=float, default=0.0, help="of the device, in bytes/s"
    )
    parser.add_argument("--memory", type=Path, help="of `racm3 quickstart`: drafts")
    parser.add_argument(
        "--threads", type=int, default=0, help="of each side; all cores"
    )
    parser.add_argument("--side", choices=SIDES, help="internal: run as this side")
    add_busy_flag(parser)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    if side := arguments.pop("side"):
        run_side(side, arguments["shape"])
        return
    check_load(parser, arguments.pop("busy"))
    results = run(arguments.pop("shape"), **arguments)
    write(results, out)
    print(format_tables(results))


if __name__ == "__main__":
    main()
