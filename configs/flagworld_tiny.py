"""A generator that trains in seconds and learns nothing, for tests.

racm3 train --config=configs/flagworld_tiny.py --workdir=out/tiny
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: as in configs/flagworld.py."""
    config = flagworld.get_config(arg)
    config.world.num_nations = 40
    config.world.num_heldout = 8
    config.world.documents_per_nation = 3
    config.world.documents_per_heldout = 3
    config.memory.index = "exact"
    config.memory.num_query_variants = 1
    config.pipeline.rows = 8
    config.pipeline.row_length = 272
    config.pipeline.examples_per_batch = 8
    config.model.max_length = 384
    config.model.d_model = 32
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.head_dim = 16
    config.model.d_ff = 64
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 4
    config.train.log_every = 2
    config.train.checkpoint_every = 2
    return config
