"""A CLIP for your own images and their captions: the encoder of the retriever.

    racm3 train --config=configs/own_clip.py --workdir=out/clip \
        --config.source=folder:photos

It learns which caption belongs to which image, only from your images. If many captions
name the same thing, set `config.group_key`: captions of the same thing are then not
used as negatives of each other.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"unknown argument {arg!r}: leave it out")
    config = ConfigDict()
    config.kind = "clip"
    config.seed = 0
    config.source = ""
    config.group_key = ""
    config.holdout = "0.1"
    # No hue, as captions name colours.
    config.augmentation = dict(mirror=True, shift=0.1, hue=0.0)
    # Trained on the captions, unless a folder is given.
    config.text_tokenizer = dict(vocab_size=1024, path="")
    config.clip = dict(
        image_size=64,
        patch_size=8,
        vision_width=128,
        vision_layers=3,
        vision_heads=4,
        text_width=128,
        text_layers=3,
        text_heads=4,
        context_length=64,
        d_embed=128,
        aligned_dims=0,
    )
    config.clip_loss = dict(
        contrast_weight=1.0,
        image_weight=0.0,
        retrieval_weight=0.5,
        retrieval_temperature=0.05,
        max_pair_similarity=0.9,
        separation_weight=0.0,
        query_drop=0.2,
    )
    # A metadata key whose values, in the captions, get invented names in every batch: for
    # names of one person or place each, that say nothing about how it looks.
    config.rename_key = ""
    config.aligned_scale = 1.0
    config.batch_size = 64
    config.optimizer = dict(
        learning_rate=1e-3,
        warmup_steps=50,
        schedule="cosine",
        b1=0.9,
        b2=0.98,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(
        num_steps=1500,
        log_every=20,
        checkpoint_every=100,
        num_microbatches=1,
        max_skipped_steps=5,
        watchdog_seconds=0.0,
        eval_every=50,
        eval_documents=256,
        patience=5,
    )
    return config
