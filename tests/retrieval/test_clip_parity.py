"""Our CLIP against `transformers.CLIPModel`, with equal random weights.

Run: OMP_NUM_THREADS=1 pytest -m parity tests/retrieval/test_clip_parity.py
"""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from flax import linen as nn

from racm3_jax.retrieval.clip import CLIP, CLIPConfig, init_params

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers are noisy
]

SHAPES = {
    "small": CLIPConfig(
        vocab_size=99,
        image_size=24,
        patch_size=8,
        vision_width=32,
        vision_layers=2,
        vision_heads=4,
        text_width=16,
        text_layers=3,
        text_heads=2,
        context_length=12,
        d_embed=24,
    ),
    "gelu": CLIPConfig(
        vocab_size=200, vision_layers=2, text_layers=2, activation="gelu"
    ),
    "vit_b_32_wide": CLIPConfig(
        vocab_size=49408,
        image_size=224,
        patch_size=32,
        vision_width=768,
        vision_layers=2,
        vision_heads=12,
        text_width=512,
        text_layers=2,
        text_heads=8,
        context_length=77,
        d_embed=512,
    ),
}


def make_reference(config: CLIPConfig):
    """A CLIPModel whose every weight is random (its own start leaves biases zero)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shared = {"projection_dim": config.d_embed, "hidden_act": config.activation}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **shared,
                "vocab_size": config.vocab_size,
                "hidden_size": config.text_width,
                "intermediate_size": 4 * config.text_width,
                "num_hidden_layers": config.text_layers,
                "num_attention_heads": config.text_heads,
                "max_position_embeddings": config.context_length,
                "bos_token_id": config.start,
                "eos_token_id": config.end,
                "pad_token_id": 0,
            },
            vision_config={
                **shared,
                "image_size": config.image_size,
                "patch_size": config.patch_size,
                "hidden_size": config.vision_width,
                "intermediate_size": 4 * config.vision_width,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_heads,
            },
            projection_dim=config.d_embed,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight) * weight.shape[-1:].numel() ** -0.5
            weight.copy_(noise + (1 if "norm" in name and "weight" in name else 0))
    return model


def port(model, config: CLIPConfig):
    """Our parameter tree with the weights of a CLIPModel."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def layer(name):
        heads = {"query": "q", "key": "k", "value": "v", "out": "out"}
        return {
            "attention": {
                ours: dense(f"{name}.self_attn.{theirs}_proj")
                for ours, theirs in heads.items()
            },
            "mlp": {"up": dense(f"{name}.mlp.fc1"), "down": dense(f"{name}.mlp.fc2")},
            "norm_1": norm(f"{name}.layer_norm1"),
            "norm_2": norm(f"{name}.layer_norm2"),
        }

    def layers(tower, count):
        return {
            f"layers_{i}": layer(f"{tower}.encoder.layers.{i}") for i in range(count)
        }

    vision, text = "vision_model.embeddings", "text_model.embeddings"
    patches = state[f"{vision}.patch_embedding.weight"].transpose(2, 3, 1, 0)
    return {
        "logit_scale": state["logit_scale"],
        "vision": {
            "patch_embedding": {"kernel": patches.reshape(-1, config.vision_width)},
            "class_embedding": state[f"{vision}.class_embedding"],
            "position_embedding": state[f"{vision}.position_embedding.weight"],
            "pre_norm": norm("vision_model.pre_layrnorm"),
            "post_norm": norm("vision_model.post_layernorm"),
            "projection": {"kernel": state["visual_projection.weight"].T},
            **layers("vision_model", config.vision_layers),
        },
        "text": {
            "token_embedding": state[f"{text}.token_embedding.weight"],
            "position_embedding": state[f"{text}.position_embedding.weight"],
            "final_norm": norm("text_model.final_layer_norm"),
            "projection": {"kernel": state["text_projection.weight"].T},
            **layers("text_model", config.text_layers),
        },
    }


@pytest.mark.parametrize("name", SHAPES)
def test_embeddings_agree_with_transformers(name):
    torch = pytest.importorskip("torch")
    config = SHAPES[name]
    model = make_reference(config)
    params = port(model, config)
    shapes = nn.unbox(
        jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    )
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), params, shapes)

    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, config.image_size, config.image_size, 3))
    images = images.astype(np.float32)
    tokens = rng.integers(1, config.start, (3, config.context_length)).astype(np.int32)
    tokens[:, 0] = config.start
    for row, end in zip(tokens, (3, config.context_length - 1, 7), strict=True):
        row[end] = config.end
        row[end + 1 :] = 0
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(tokens).long(),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        )
    image, text, log_scale = CLIP(config).apply({"params": params}, images, tokens)
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    assert_close(image, theirs.image_embeds.numpy())
    assert_close(text, theirs.text_embeds.numpy())
    logits = np.exp(log_scale) * text @ image.T
    np.testing.assert_allclose(
        logits, theirs.logits_per_text.numpy(), rtol=1e-5, atol=2e-5
    )


def assert_close(ours, theirs):
    """Equal to 1e-5 of each row's length."""
    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert error.max() < 1e-5, error
