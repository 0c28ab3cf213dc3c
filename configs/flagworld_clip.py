"""The CLIP of flagworld, the frozen encoder of the retriever.

    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip
    racm3 train --config=configs/flagworld_clip.py:aligned --workdir=out/clip_aligned

The first is the shipped one, which separates texts and images: it finds documents, but
cannot tell whether an image matches a text. `aligned` is trained contrastively on
captions half of which describe the flag, and every pair of documents gets an invented
name in each batch: no flag can be learned by name, so that names are compared by their
letters, with a document's text. Its weights are kept in experiments/weights/clip_aligned,
with its alignment: of 320 held-out captions that describe, 76% find their image first,
of the images 79% their caption. Right documents are found first by 96% of the captions
that only name (100% by the shipped one), by all that describe (78%), and by 86% of the
images (97%; experiments/LOG.md).
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the shipped one, "aligned" for one that aligns texts and images."""
    if arg not in ("", "aligned"):
        raise ValueError(f"unknown argument {arg!r}: use :aligned, or none")
    config = ConfigDict()
    config.kind = "clip"
    config.seed = 0
    config.world = flagworld.world()
    config.world.documents_per_nation = 5
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
        context_length=32,
        d_embed=128,
    )
    # A name does not predict a flag that training has not seen, so texts and images are
    # separated; a nation's documents stay different enough for the strategy, which
    # drops those with a similarity above 0.9 (see CLIPLossConfig).
    config.clip_loss = dict(
        contrast_weight=0.02,
        image_weight=0.0,
        retrieval_weight=1.0,
        retrieval_temperature=0.05,
        max_pair_similarity=0.6,
        separation_weight=20.0,
        aligned_dims=0,
        query_drop=0.2,
    )
    config.rename_key = ""
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
        num_steps=1400,
        log_every=20,
        checkpoint_every=500,
        num_microbatches=1,
        max_skipped_steps=0,
        watchdog_seconds=0.0,
    )
    if arg == "aligned":
        config.world.description_share = 0.5
        # Existing generators keep their vocabulary.
        config.text_tokenizer.path = "shipped:flagworld/tokenizer/text"
        config.clip.context_length = 80
        # A name says nothing about an image here, and is compared letter by letter.
        config.rename_key = "nation"
        config.clip_loss.contrast_weight = 1.0
        config.clip_loss.retrieval_weight = 1.5
        config.clip_loss.image_weight = 0.5
        config.clip_loss.separation_weight = 0.0
        config.train.num_steps = 800
    return config
