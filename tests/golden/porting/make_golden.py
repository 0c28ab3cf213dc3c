"""Makes the golden files of tests/porting from the reference implementations.

Run: OMP_NUM_THREADS=1 python tests/golden/porting/make_golden.py
Needs the [parity] extra. The weights are random numbers that the tests generate from the
same seeds; only inputs and outputs are stored.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "porting"))

from chameleon_fakes import hf_record, in_layout, native_state
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip
from vqgan_fakes import (
    DIFFUSERS_RECORD,
    VQGAN_CONFIG,
    diffusers_state,
    vqgan_state,
)


def tensors(state):
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def make_clip() -> dict[str, np.ndarray]:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        write_hf_clip(source, CLIP_CONFIG, clip_state(CLIP_CONFIG))
        model = transformers.CLIPModel.from_pretrained(source).eval()
    rng = np.random.default_rng(1)
    size = CLIP_CONFIG.image_size
    images = rng.integers(0, 256, (3, size, size, 3)).astype(np.uint8)
    tokens = np.zeros((3, CLIP_CONFIG.context_length), np.int64)
    for row, length in zip(tokens, (1, 4, 7), strict=True):
        row[0] = CLIP_CONFIG.start
        row[1 : 1 + length] = rng.integers(0, CLIP_CONFIG.start, length)
        row[1 + length] = CLIP_CONFIG.end
    mean = np.array(CLIP_CONFIG.image_mean, np.float32)
    std = np.array(CLIP_CONFIG.image_std, np.float32)
    pixels = (images.astype(np.float32) / 255 - mean) / std
    out = model(
        input_ids=torch.from_numpy(tokens),
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
    )
    return {
        "images": images,
        "tokens": tokens.astype(np.int32),
        "image_embeds": out.image_embeds.numpy(),
        "text_embeds": out.text_embeds.numpy(),
    }


def make_vqgan() -> dict[str, np.ndarray]:
    import diffusers

    fields = {k: v for k, v in DIFFUSERS_RECORD.items() if not k.startswith("_")}
    model = diffusers.VQModel(**fields).eval()
    model.load_state_dict(tensors(diffusers_state(vqgan_state(VQGAN_CONFIG))))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    pixels = images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    latents = model.encode(torch.from_numpy(pixels)).latents
    quantized, _, (_, _, codes) = model.quantize(latents)
    decoded = model.decode(quantized, force_not_quantize=True).sample
    return {
        "images": images,
        "codes": codes.reshape(4, -1).numpy().astype(np.int32),
        "decoded": decoded.permute(0, 2, 3, 1).numpy(),
    }


def make_chameleon() -> dict[str, np.ndarray]:
    import transformers

    record = hf_record()
    config = transformers.ChameleonConfig(
        **{k: v for k, v in record.items() if k not in ("model_type", "architectures")}
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    state = tensors(in_layout(native_state(record), record, "hf"))
    rest = model.load_state_dict(state, strict=False)
    assert not rest.unexpected_keys
    assert all(key.startswith("model.vqmodel.") for key in rest.missing_keys)
    tokens = np.random.default_rng(3).integers(0, record["vocab_size"], (2, 24))
    hidden = model.model(input_ids=torch.from_numpy(tokens))[0]
    return {"tokens": tokens, "logits": model.lm_head(hidden).numpy()}


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for make in (make_clip, make_vqgan, make_chameleon):
            path = HERE / f"{make.__name__.removeprefix('make_')}.npz"
            np.savez_compressed(path, **make())
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
