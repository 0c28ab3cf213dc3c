"""The quickstart on flagworld, in minutes on two CPU cores, from the shipped weights.

    racm3 quickstart --workdir=racm3_out
    racm3 quickstart --workdir=racm3_out --short

Builds a memory of 11,000 documents (4,000 in the short form), continues training the
shipped generator with live retrieval, then generates images and captions of held-out
nations.
"""

from ml_collections import ConfigDict

from configs import flagworld, flagworld_reading


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "short" (under 90 seconds, for CI)."""
    if arg not in ("", "short"):
        raise ValueError(f"unknown argument {arg!r}: use :short, or none")
    short = arg == "short"
    config = flagworld_reading.get_config("fifth")
    config.world = flagworld.world()
    config.init_from = "shipped:flagworld/model"
    # Documents of training nations in the memory, besides all held-out ones.
    config.num_train_documents = 1500 if short else 8500
    config.num_prompts = 4 if short else 8
    del config.pairing  # documents are retrieved, not chosen by class
    config.memory.index = "scann"
    config.memory.num_query_variants = 1
    config.memory.include_heldout = True
    config.pipeline.max_documents = 2
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 5
    config.optimizer.schedule = "linear"
    config.train.num_steps = 8 if short else 40
    config.train.log_every = 2
    config.train.checkpoint_every = 20
    return config
