"""An image tokenizer for your own images: 64 to 256 pixels, 64 to 1,024 codes each.

    racm3 train --config=configs/own_tokenizer.py --workdir=out/tokenizer \
        --config.source=folder:photos
    racm3 train --config=configs/own_tokenizer.py:256 --workdir=out/tokenizer \
        --config.source=folder:photos

`:64`, `:128` (the default) and `:256` are the side in pixels. 64 and 128 are for a CPU,
256 for a GPU. `racm3 fit` runs this, own_clip and own_generator one after the other.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: side of the images in pixels, "64", "128" or "256"."""
    if arg not in ("", "64", "128", "256"):
        raise ValueError(f"unknown argument {arg!r}: use :64, :128 or :256")
    is_large = arg == "256"
    config = ConfigDict()
    config.kind = "vqgan"
    config.seed = 0
    # Training documents, their groups, and the held-out groups: see
    # racm3_jax/documents/sources.py.
    config.source = ""
    config.group_key = ""
    config.holdout = "0.1"
    config.augmentation = dict(mirror=True, shift=0.1, hue=0.05)
    config.vqgan = dict(
        image_size=int(arg or 128),
        stem_patch=4,
        encoder="conv",
        channels=64,
        channel_multipliers=(1, 2),
        num_res_blocks=2 if is_large else 1,
        attention_resolutions=(),
        z_channels=128,
        num_codes=4096 if is_large else 1024,
        d_code=32,
        quantizer="cosine",
    )
    config.vqgan_loss = dict(
        l1_weight=1.0,
        l2_weight=5.0,
        edge_weight=0.25,
        codebook_weight=0.0,
        commitment_weight=0.25,
        # Codes follow the mean of their latents; unused codes move.
        codebook_decay=0.98,
        revive_below=0.05,
        # On a GPU, a patch discriminator sharpens textures after the rest is learned.
        adversarial_weight=0.05 if is_large else 0.0,
        adversarial_start=5000,
    )
    config.codebook_images = 64
    config.batch_size = 64 if is_large else 16
    config.optimizer = dict(
        learning_rate=1e-3 if not is_large else 4e-4,
        warmup_steps=50,
        schedule="cosine",
        b1=0.9,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(
        num_steps=20_000 if is_large else 1500,
        log_every=25,
        checkpoint_every=100,
        num_microbatches=1,
        max_skipped_steps=5,
        watchdog_seconds=0.0,
        eval_every=1000 if is_large else 100,
        eval_documents=64,
        patience=5,
        sheet_rows=6,
    )
    return config
