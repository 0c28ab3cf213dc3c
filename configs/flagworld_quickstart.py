"""The main job on flagworld, in minutes on two CPU cores, from the shipped weights.

    racm3 quickstart --workdir=racm3_out
    racm3 quickstart --workdir=racm3_out --short

Builds a memory of 11,000 documents (4,000 in the short form), goes on training the
shipped generator with live retrieval, then draws and captions held-out nations.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "short" (under 90 seconds, for CI)."""
    if arg not in ("", "short"):
        raise ValueError(
            f"configs/flagworld_quickstart.py:{arg}: use :short or nothing"
        )
    short = arg == "short"
    config = ConfigDict()
    config.kind = "generator"
    config.seed = 0
    config.world = dict(
        seed=0,
        num_nations=4000,
        num_heldout=320,
        documents_per_nation=5,
        documents_per_heldout=8,
        image_size=64,
    )
    # Documents of training nations in the memory, beside all of the held-out ones.
    config.num_train_documents = 1500 if short else 8500
    config.tokenizer = dict(
        text="shipped:flagworld/tokenizer/text",
        image="shipped:flagworld/tokenizer/image",
        num_sentinels=16,
    )
    config.embedder = "shipped:flagworld/clip"
    config.init_from = "shipped:flagworld/model"
    config.twin = "shipped:flagworld/twin"
    config.memory = dict(
        index="scann", num_query_variants=1, query_drop=0.2, include_heldout=True
    )
    config.strategy = dict(max_similarity=0.9, num_candidates=24)
    config.masking = dict(num_masks="poisson_clamp0", rotation_probability=0.4)
    config.pipeline = dict(
        rows=16,
        row_length=272,
        examples_per_batch=20,
        max_documents=2,
        alpha=0.1,
        query_modality="both",
        retrieval=True,
    )
    config.model = dict(
        d_model=256,
        num_layers=4,
        num_heads=4,
        head_dim=64,
        d_ff=1024,
        max_length=384,
        activation="gelu",
        compute_dtype="bfloat16",
    )
    config.loss = dict(z_loss=1e-5)
    config.optimizer = dict(
        learning_rate=5e-5,
        warmup_steps=5,
        schedule="linear",
        b1=0.9,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.train = dict(num_steps=8 if short else 40, log_every=2, checkpoint_every=20)
    config.num_prompts = 4 if short else 8
    return config
