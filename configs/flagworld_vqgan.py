"""The VQGAN of flagworld: 64x64 pixels -> 8x8 codes of 512.

racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"unknown argument {arg!r}: leave it out")
    config = ConfigDict()
    config.kind = "vqgan"
    config.seed = 0
    config.world = flagworld.world()
    config.world.num_nations = 4000
    config.world.documents_per_nation = 5
    config.vqgan = dict(
        image_size=64,
        stem_patch=8,
        encoder="patch",
        channels=128,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=192,
        num_codes=512,
        d_code=192,
        quantizer="euclidean",
    )
    config.vqgan_loss = dict(
        l1_weight=1.0,
        l2_weight=5.0,
        edge_weight=0.25,
        codebook_weight=0.05,
        commitment_weight=0.05,
    )
    # The codebook is initialised by k-means of the patches of this many images.
    config.codebook_images = 2500
    config.batch_size = 32
    config.optimizer = dict(
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="cosine",
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(
        num_steps=1500,
        log_every=50,
        checkpoint_every=500,
        num_microbatches=1,
        max_skipped_steps=0,
        watchdog_seconds=0.0,
    )
    return config
