"""A small VQGAN under taming's names, and the same weights under diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from porting_fakes import random_state

from racm3_jax.porting.vqgan import vqgan_rules
from racm3_jax.tokenizers.vqgan import VQGANConfig

VQGAN_CONFIG = VQGANConfig(
    image_size=16,
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    z_channels=8,
    num_codes=24,
    d_code=8,
)
DIFFUSERS_RECORD = {
    "_class_name": "VQModel",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 8,
    "sample_size": 16,
    "num_vq_embeddings": 24,
    "norm_num_groups": 32,
    "vq_embed_dim": 8,
    "scaling_factor": 0.18215,
}


def vqgan_state(config: VQGANConfig, seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {rule.theirs: rule.shape for rule in vqgan_rules(config, "taming")}
    return random_state(shapes, seed)


def diffusers_state(taming: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renamed part by part; the attention's 1x1 convolutions become linear layers."""
    state = {}
    for name, array in taming.items():
        attention = re.search(r"attn[._]", name)
        name = re.sub(r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets.", name)
        name = re.sub(r"down\.(\d+)\.attn\.", r"down_blocks.\1.attentions.", name)
        name = re.sub(
            r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", name
        )
        for level in (0, 1):  # two levels: diffusers counts the decoder's from below
            up = f"up_blocks.{1 - level}"
            name = name.replace(f"up.{level}.block.", f"{up}.resnets.")
            name = name.replace(f"up.{level}.attn.", f"{up}.attentions.")
            name = name.replace(f"up.{level}.upsample", f"{up}.upsamplers.0")
        name = name.replace("mid.block_1", "mid_block.resnets.0")
        name = name.replace("mid.block_2", "mid_block.resnets.1")
        name = name.replace("mid.attn_1", "mid_block.attentions.0")
        name = name.replace("nin_shortcut", "conv_shortcut")
        name = name.replace("norm_out", "conv_norm_out")
        if attention:
            name = re.sub(r"\.norm\.", ".group_norm.", name)
            name = re.sub(r"\.([qkv])\.(weight|bias)$", r".to_\1.\2", name)
            name = name.replace("proj_out", "to_out.0")
            if array.ndim == 4:
                array = np.ascontiguousarray(array[:, :, 0, 0])
        state[name] = array
    return state
