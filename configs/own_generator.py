"""A generator for your own images, after own_tokenizer and own_clip.

    racm3 train --config=configs/own_generator.py --workdir=out/generator \
        --config.source=folder:photos --config.tokenizer.image=out/tokenizer/vqgan \
        --config.tokenizer.text=out/clip/text --config.embedder=out/clip/clip

`:64`, `:128` (the default) and `:256` are the image side in pixels. The
memory of the training documents is built in the work directory, unless
`config.memory_path` is set.
"""

from ml_collections import ConfigDict

# Codes of an image, and the row length for two retrieved documents and the main one.
_ROW_LENGTHS = {"64": 320, "128": 896, "256": 3328}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: side of the images in pixels, "64", "128" or "256"."""
    if arg not in ("", *_ROW_LENGTHS):
        raise ValueError(f"unknown argument {arg!r}: use :64, :128 or :256")
    row_length = _ROW_LENGTHS[arg or "128"]
    is_large = arg == "256"
    config = ConfigDict()
    config.kind = "generator"
    config.seed = 0
    config.source = ""
    config.group_key = ""
    config.holdout = "0.1"
    # Target and documents get the same augmentation. No hue, as captions name colours;
    # where they do not, it keeps a model from memorising images.
    config.augmentation = dict(mirror=True, shift=0.1, hue=0.0, num_variants=7)
    # image_size: a side in pixels for the start of a curriculum, 0 for the tokenizer's.
    # Half of the side means a quarter of the codes, which documents tell more about.
    config.tokenizer = dict(text="", image="", num_sentinels=16, image_size=0)
    config.embedder = ""
    config.init_from = ""
    config.memory_path = ""
    # Held-out documents are never retrieved for training documents, but for one another
    # in the evaluation, and by users.
    config.memory = dict(
        index="auto", num_query_variants=2, query_drop=0.2, include_heldout=True
    )
    # A CLIP trained on few images has high similarities: only near copies are dropped.
    # "house,thing": documents that agree in both are never retrieved for each other.
    config.strategy = dict(max_similarity=0.98, num_candidates=24, exclude_keys="")
    # Documents chosen by a metadata key instead of by the retriever, for a curriculum:
    # with same_probability=1 one of them is the main document itself, so that a model
    # first learns to copy.
    config.pairing = dict(
        probability=0.0,
        num_documents=(2,),
        wrong_probability=0.5,
        right_probability=1.0,
        same_probability=0.0,
        class_key="",
        rename=False,
        name_weight=1.0,
    )
    config.masking = dict(
        num_masks="poisson_clamp0", mean=0.3, rotation_probability=0.25
    )
    config.pipeline = dict(
        rows=32 if is_large else 4,
        row_length=row_length,
        examples_per_batch=44 if is_large else 6,
        max_documents=2,
        alpha=0.1,
        query_modality="both",
        retrieval=True,
        # "as_main": what is asked for comes last in all documents; a small model learns
        # sooner to read names.
        segment_order="stored",
        groups=1,
    )
    config.model = dict(
        d_model=768 if is_large else 256,
        num_layers=12 if is_large else 4,
        num_heads=6 if is_large else 4,
        head_dim=128 if is_large else 64,
        d_ff=3072 if is_large else 1024,
        max_length=row_length,
        position="rope",
        norm="rmsnorm",
        # A small model without it learns sooner to choose between its documents.
        qk_norm=is_large,
        # A learned position within the image: drawings of one thing agree by place.
        image_positions=True,
        activation="gelu",
        compute_dtype="auto",
    )
    config.loss = dict(z_loss=1e-5)
    config.optimizer = dict(
        learning_rate=5e-4 if is_large else 2e-3,
        warmup_steps=100,
        schedule="cosine",
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(
        num_steps=20_000 if is_large else 2000,
        log_every=25,
        checkpoint_every=100,
        num_microbatches=1,
        max_skipped_steps=5,
        watchdog_seconds=0.0,
        eval_every=1000 if is_large else 200,
        eval_documents=32,
        patience=3,
        sheet_rows=4,
    )
    return config
