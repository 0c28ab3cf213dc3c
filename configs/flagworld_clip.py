"""The CLIP of flagworld, the frozen encoder of the retriever and a judge of samples.

    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip

One part of an embedding aligns texts with images: it is trained contrastively on captions
half of which describe the flag. The other finds documents by what only their texts, or
only their images, have: every pair of documents gets an invented name in each batch, so
that no flag is learned by name, and names are compared by their letters.
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"unknown argument {arg!r}: leave it out")
    config = ConfigDict()
    config.kind = "clip"
    config.seed = 0
    config.world = flagworld.world()
    config.world.documents_per_nation = 5
    config.world.description_share = 0.5
    # Existing generators keep their vocabulary; with path="" it is trained on the captions.
    config.text_tokenizer = dict(
        vocab_size=1024, path="shipped:flagworld/tokenizer/text"
    )
    config.clip = dict(
        image_size=64,
        patch_size=8,
        vision_width=128,
        vision_layers=3,
        vision_heads=4,
        text_width=128,
        text_layers=3,
        text_heads=4,
        context_length=80,
        d_embed=192,
        aligned_dims=64,
    )
    # A nation's documents stay different enough for the strategy, which drops those with
    # a higher similarity than its own limit (see CLIPLossConfig).
    config.clip_loss = dict(
        contrast_weight=1.0,
        image_weight=0.75,
        retrieval_weight=1.5,
        retrieval_temperature=0.05,
        max_pair_similarity=0.6,
        separation_weight=20.0,
        query_drop=0.2,
    )
    # A name says nothing about an image here, and is compared letter by letter.
    config.rename_key = "nation"
    # Chosen on the nations of another world: what the aligned part describes makes an
    # image find another nation's image of the same scene.
    config.aligned_scale = 0.5
    config.batch_size = 128
    config.optimizer = dict(
        learning_rate=1.5e-3,
        warmup_steps=100,
        schedule="cosine",
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(
        num_steps=1000,
        log_every=20,
        checkpoint_every=100,
        num_microbatches=1,
        max_skipped_steps=0,
        watchdog_seconds=0.0,
    )
    return config
