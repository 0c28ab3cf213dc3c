"""Light fine-tuning of converted Chameleon weights with retrieved documents.

    racm3 convert chameleon SRC out/chameleon --vqgan=... --clip=... --accept_licence
    racm3 memory build --source=folder:photos --memory=out/memory --for=training \
        --tokenizer=out/chameleon/tokenizer --embedder=out/chameleon/clip
    racm3 train --config=configs/chameleon_finetune.py:image_output --workdir=out/tuned \
        --config.init_from=out/chameleon/model --config.embedder=out/chameleon/clip \
        --config.tokenizer.text=out/chameleon/tokenizer/text \
        --config.tokenizer.image=out/chameleon/tokenizer/image \
        --config.memory_path=out/memory

`:image_output` trains only the output rows of the image codes, 34M of the 7B
parameters, as public work did to restore image generation with these weights. Without
it all 7B are trained. Hardware: 8 accelerators of 80 GB for all parameters (28 GB of
weights and twice as much of moments, in float32, sharded); one of 80 GB for
`:image_output`. Not run at this size: the tests build it by shape, and run both forms
at small size.
"""

from ml_collections import ConfigDict

from configs import racm3_2b7


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" trains all, "image_output" only the output rows of the image codes."""
    if arg not in ("", "image_output"):
        raise ValueError(f"unknown argument {arg!r}: use :image_output, or none")
    config = racm3_2b7.get_config()
    config.train_only = "image_output_rows" if arg else "all"
    config.model = dict(
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        d_ff=11_008,
        max_length=4096,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        qk_norm=True,
        use_bias=False,
        tie_embeddings=False,
        compute_dtype="bfloat16",
        scan_layers=True,
        remat="full",
    )
    config.masking.max_masks = 16
    config.pipeline.rows = 8
    config.pipeline.examples_per_batch = 10
    config.pipeline.groups = 1
    # Untrained rows can change fast; trained weights must not.
    config.optimizer.learning_rate = 1e-3 if arg else 1e-5
    config.optimizer.warmup_steps = 20 if arg else 100
    config.train.num_steps = 1000 if arg else 2000
    config.train.log_every = 10
    config.train.checkpoint_every = 250
    return config
