"""A generator that trains in seconds and learns nothing: for tests and first looks.

racm3 train --config=configs/flagworld_tiny.py --workdir=out/tiny
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "retrieval" for RA-CM3, "twin" for the model without retrieval."""
    if arg not in ("", "retrieval", "twin"):
        raise ValueError(f"configs/flagworld_tiny.py:{arg}: use :retrieval or :twin")
    config = ConfigDict()
    config.kind = "generator"
    config.seed = 0
    config.world = dict(
        seed=0,
        num_nations=40,
        num_heldout=8,
        documents_per_nation=3,
        documents_per_heldout=3,
        image_size=64,
    )
    config.tokenizer = dict(
        text="shipped:flagworld/tokenizer/text",
        image="shipped:flagworld/tokenizer/image",
        num_sentinels=16,
    )
    config.embedder = "shipped:flagworld/clip"
    config.init_from = ""
    config.memory = dict(
        index="exact", num_query_variants=1, query_drop=0.2, include_heldout=False
    )
    config.strategy = dict(max_similarity=0.9, num_candidates=24)
    config.masking = dict(num_masks="poisson_clamp0", rotation_probability=0.4)
    config.pipeline = dict(
        rows=8,
        row_length=280,
        examples_per_batch=8,
        max_documents=2,
        alpha=0.1,
        query_modality="both",
        retrieval=arg != "twin",
    )
    config.model = dict(
        d_model=32,
        num_layers=2,
        num_heads=2,
        head_dim=16,
        d_ff=64,
        max_length=320,
        activation="gelu",
    )
    config.loss = dict(z_loss=1e-5)
    config.optimizer = dict(
        learning_rate=1e-3,
        warmup_steps=2,
        schedule="cosine",
        b1=0.9,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(num_steps=4, log_every=2, checkpoint_every=2)
    return config
