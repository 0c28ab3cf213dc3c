"""The VQGAN of flagworld: 64x64 pixels -> 8x8 codes of 512.

    racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"configs/flagworld_vqgan.py takes no argument; got {arg!r}")
    config = ConfigDict()
    config.kind = "vqgan"
    config.seed = 0
    config.world = dict(
        seed=0,
        num_nations=4000,
        num_heldout=320,
        documents_per_nation=5,
        documents_per_heldout=8,
        image_size=64,
    )
    config.vqgan = dict(
        image_size=64,
        stem_patch=4,
        channels=64,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        z_channels=128,
        num_codes=512,
        d_code=16,
    )
    config.batch_size = 64
    config.optimizer = dict(
        learning_rate=1e-3,
        warmup_steps=100,
        schedule="cosine",
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(num_steps=2500, log_every=20, checkpoint_every=500)
    return config
