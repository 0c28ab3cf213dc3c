"""The paper's training step, with two layers, compiled for absent machines.

    pip install -e '.[tpu-compile,gpu-compile]' && pytest -n 0 -m absent

Width, vocabulary and row length are those of `configs/racm3_2b7.py`. A compiler that is not
installed is skipped. On one core the GPU's takes 10 seconds, the TPU's 85.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import linen as nn

from racm3_jax.retrieval.clip import CLIPConfig, init_params
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.bpe import TextTokenizer

pytestmark = pytest.mark.absent
ROOT = pathlib.Path(__file__).parent.parent.parent
DEVICES, LAYERS = 8, 2
WIDTH, VOCABULARY, FFN, LENGTH = 2560, 65_536, 10_240, 4096


def needs(package, extra):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs racm3_jax[{extra}]")


def compile_first(device, num_devices, *arguments):
    """The first part of `racm3 estimate --json`; a separate process, as XLA reads its
    flags once."""
    command = [
        *(sys.executable, "-m", "racm3_jax.cli", "estimate", "--compile", "--json"),
        *("--max_compiles=1", f"--device={device}:{num_devices}"),
        f"--config={ROOT}/configs/racm3_2b7.py",
        *arguments,
    ]
    given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["compiled"]
    assert found["fits"] and found["num_devices"] == num_devices
    return found["parts"][0]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("v5e", marks=needs("libtpu", "tpu-compile")),
        pytest.param("h100", marks=needs("jax_cuda12_plugin", "gpu-compile")),
    ],
)
def test_a_training_step(device):
    part = compile_first(
        device,
        DEVICES,
        f"--config.model.num_layers={LAYERS}",
        "--config.model.remat=full",
        f"--config.pipeline.rows={DEVICES}",
    )
    layer = WIDTH * (4 * WIDTH + 2 * FFN)
    table = VOCABULARY * WIDTH
    # Weights and two moments, float32, a shard of each; vectors and the batch are small.
    # The embedding is the head; positions are learned.
    matrices = LAYERS * layer + table + LENGTH * WIDTH
    assert part["argument_bytes"] == pytest.approx(12 * matrices / DEVICES, rel=0.01)
    assert part["peak_bytes"] < 4.5e9
    # A layer is gathered twice, forward and in recomputation, in bfloat16; the table is
    # gathered once as the head; gradients are scattered once, in float32. Once for each of
    # the 64 chunks of the loss would be ten times as much.
    kinds = part["collectives"]
    assert kinds["reduce-scatter"]["count"] > 0
    assert all(kind["trips_known"] for kind in kinds.values())
    expected = 2 * 2 * LAYERS * layer + 2 * table + 4 * matrices
    assert part["wire_bytes"] == pytest.approx(expected, rel=0.2)
    gathers = kinds["all-gather"]
    assert gathers["asynchronous_count"] > 0.5 * gathers["count"]


@needs("libtpu", "tpu-compile")
def test_finished_layers_hold_no_memory(tmp_path):
    """64 images by eight layers: 0.22 GB; 0.44 where their sums are taken apart."""
    tokenizer = TextTokenizer.train(["a b"], 260)
    config = CLIPConfig(
        image_size=224,
        patch_size=14,
        vision_width=256,
        vision_layers=8,
        vision_heads=4,
        text_width=32,
        text_layers=1,
        text_heads=1,
        context_length=8,
        vocab_size=tokenizer.vocab_size + 2,
        d_embed=32,
    )
    params = nn.unbox(init_params(config, jax.random.key(0)))
    DocumentEmbedder(config, params, tokenizer).save(tmp_path / "clip")
    part = compile_first(
        *("v5e", 1, "--what=embed", "--size=64"),
        f"--config.embedder={tmp_path / 'clip'}",
    )
    assert part["peak_bytes"] - part["argument_bytes"] < 0.3e9
