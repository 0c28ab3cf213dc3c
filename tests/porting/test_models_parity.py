"""VQGAN against `diffusers`, Chameleon and exports against `transformers`.

Run: OMP_NUM_THREADS=1 pytest -m parity tests/porting/test_models_parity.py
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chameleon_fakes import LAYOUTS, hf_record, native_state, write_chameleon
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip, write_torch_file
from vqgan_fakes import (
    DIFFUSERS_RECORD,
    VQGAN_CONFIG,
    diffusers_state,
    vqgan_state,
)

from racm3_jax.checkpoints import load_weights
from racm3_jax.model.transformer import Transformer, compute_logits
from racm3_jax.porting.chameleon import convert_chameleon
from racm3_jax.porting.clip import convert_clip
from racm3_jax.porting.export import export_hf
from racm3_jax.porting.files import read_json
from racm3_jax.porting.vqgan import convert_vqgan
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.vqgan import VQGAN

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers are noisy
]

CHAMELEONS = {
    "grouped": {},
    "all_heads": {"heads": 2, "kv_heads": 2, "head_dim": 16},
    "one_kv_head": {"heads": 4, "kv_heads": 1, "layers": 3},
    "wide": {"heads": 8, "kv_heads": 4, "head_dim": 32, "layers": 1},
}


@pytest.mark.parametrize("image_size", [16, 64])
def test_vqgan_against_diffusers(tmp_path, image_size):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(
        VQGAN_CONFIG,
        image_size=image_size,
        attention_resolutions=(image_size // 2,),
        num_codes=512,
    )
    state = vqgan_state(config)
    write_torch_file(tmp_path / "v.ckpt", state)
    convert_vqgan(tmp_path / "v.ckpt", tmp_path / "out", image_size=image_size)
    tokenizer = ImageTokenizer.load(tmp_path / "out", batch_size=8)
    fields = {k: v for k, v in DIFFUSERS_RECORD.items() if not k.startswith("_")}
    fields |= {"sample_size": image_size, "num_vq_embeddings": 512}
    model = diffusers.VQModel(**fields).eval()
    model.load_state_dict(
        {n: torch.from_numpy(x) for n, x in diffusers_state(state).items()}
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, image_size, image_size, 3)).astype(np.uint8)
    pixels = images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pixels)).latents
        quantized, _, (_, _, codes) = model.quantize(latents)
        decoded = model.decode(quantized, force_not_quantize=True).sample
    theirs = codes.reshape(8, -1).numpy()
    assert (tokenizer.encode(images) == theirs).mean() >= 0.999
    assert len(np.unique(theirs)) > 20
    ours = VQGAN(config).apply(
        {"params": tokenizer.params}, theirs.astype(np.int32), method="decode_codes"
    )
    decoded = decoded.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, decoded, rtol=1e-4, atol=1e-4)


def test_gumbel_form_against_its_definition(tmp_path):
    """Scores by a 1x1 convolution of the latents, the best one's embedding decoded.

    The quantizer is written here (taming's, at evaluation: no noise, hard choice); the
    networks around it are diffusers'.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(VQGAN_CONFIG, num_codes=512, quantizer="gumbel")
    state = vqgan_state(config)
    write_torch_file(tmp_path / "v.ckpt", state)
    convert_vqgan(tmp_path / "v.ckpt", tmp_path / "out", image_size=16)
    tokenizer = ImageTokenizer.load(tmp_path / "out", batch_size=8)
    fields = {k: v for k, v in DIFFUSERS_RECORD.items() if not k.startswith("_")}
    model = diffusers.VQModel(**fields | {"num_vq_embeddings": 512}).eval()
    quantizer = {n: x for n, x in state.items() if n.startswith("quantize.")}
    rest = {n: x for n, x in state.items() if n not in quantizer}
    tensors = {n: torch.from_numpy(x) for n, x in diffusers_state(rest).items()}
    keys = model.load_state_dict(tensors, strict=False)
    assert keys.missing_keys == ["quantize.embedding.weight"]
    assert not keys.unexpected_keys
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    pixels = images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    weights = {n: torch.from_numpy(x) for n, x in quantizer.items()}
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pixels)).latents
        scores = torch.nn.functional.conv2d(
            latents, weights["quantize.proj.weight"], weights["quantize.proj.bias"]
        )
        codes = scores.argmax(1)
        quantized = weights["quantize.embed.weight"][codes].permute(0, 3, 1, 2)
        decoded = model.decode(quantized, force_not_quantize=True).sample
    theirs = codes.reshape(16, -1).numpy()
    assert (tokenizer.encode(images) == theirs).mean() >= 0.999
    assert len(np.unique(theirs)) > 10
    ours = VQGAN(config).apply(
        {"params": tokenizer.params}, theirs.astype(np.int32), method="decode_codes"
    )
    decoded = decoded.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHAMELEONS)
def test_chameleon_against_transformers(tmp_path, name):
    """Logits, and 64 greedy steps, from each of the four layouts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    record = hf_record(**CHAMELEONS[name])
    native = native_state(record)
    write_torch_file(tmp_path / "v.ckpt", vqgan_state(VQGAN_CONFIG))
    write_chameleon(tmp_path / "hf", record, native, "hf")
    reference = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(0).integers(0, record["vocab_size"], (2, 40))

    def their_logits(ids):
        with torch.no_grad():
            hidden = reference.model(input_ids=torch.from_numpy(ids))[0]
            return reference.lm_head(hidden).numpy()

    theirs = their_logits(tokens)
    greedy = tokens[:1, :4]
    for _ in range(64):
        best = their_logits(greedy)[:, -1].argmax(-1)[:, None]
        greedy = np.concatenate([greedy, best], axis=1)

    for layout in LAYOUTS:
        if layout != "hf":
            write_chameleon(tmp_path / layout, record, native, layout)
        out = tmp_path / f"{layout}_out"
        config = convert_chameleon(
            tmp_path / layout,
            out,
            vqgan=tmp_path / "v.ckpt",
            accept_licence=True,
            image_size=16,
        )
        params = jax.tree.map(jnp.asarray, load_weights(out / "model", "generator")[0])
        orders = read_json(out / "source" / "vocabulary.json")
        to_ours = np.argsort(orders["inputs"])
        outputs = np.array(orders["outputs"])
        model = Transformer(config)

        @jax.jit
        def compute(ids, model=model, params=params, config=config):
            index = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            hidden = model.apply({"params": params}, ids, index, np.ones_like(index))
            return compute_logits(params, config, hidden)

        logits = np.asarray(compute(to_ours[tokens].astype(np.int32)))
        np.testing.assert_allclose(logits, theirs[..., outputs], rtol=1e-4, atol=1e-4)

        ids = np.zeros((1, 68), np.int32)
        ids[:, :4] = to_ours[tokens[:1, :4]]
        for i in range(4, 68):
            # Their token, because <s> (read) and </s> (written) are one token of ours.
            best = outputs[int(compute(ids)[0, i - 1].argmax())]
            ids[0, i] = to_ours[best]
        np.testing.assert_array_equal(ids, to_ours[greedy])


def test_exports_load_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_hf_clip(tmp_path / "clip", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    convert_clip(tmp_path / "clip", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    model, info = transformers.CLIPModel.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    embedder = DocumentEmbedder.load(tmp_path / "ours")
    texts = ["The flag of the", "flag!"]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    ours = embedder.tokenizer.encode_batch(texts)
    for their_row, row in zip(ids.tolist(), ours.tolist(), strict=True):
        end = row.index(CLIP_CONFIG.end)
        assert their_row[: end + 1] == row[: end + 1]
    with torch.no_grad():
        embeds = model.eval().get_text_features(input_ids=torch.from_numpy(ours).long())
        embeds = getattr(embeds, "pooler_output", embeds).numpy()
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed_texts(texts), embeds, atol=1e-5)

    record = hf_record()
    write_torch_file(tmp_path / "v.ckpt", vqgan_state(VQGAN_CONFIG))
    source = write_chameleon(tmp_path / "n", record, native_state(record), "native")
    convert_chameleon(
        source,
        tmp_path / "ours_c",
        vqgan=tmp_path / "v.ckpt",
        accept_licence=True,
        image_size=16,
    )
    export_hf(tmp_path / "ours_c", tmp_path / "back_c")
    _, info = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "back_c", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
