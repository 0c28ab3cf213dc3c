"""Goes on with the flagworld models, for all tasks: infilling, editing, k-shot labels.

    racm3 train --config=configs/flagworld_tasks.py --workdir=out/racm3_tasks \\
        --config.init_from=out/racm3/model
    racm3 train --config=configs/flagworld_tasks.py:twin --workdir=out/cm3_tasks \\
        --config.init_from=out/cm3/model

More spans are moved than in configs/flagworld.py, so that gaps in images are filled; a
tenth of the main documents are questions about demonstrations with labels that mean
nothing. Model and twin see the same main documents, masked alike, in the same order.

When the shipped weights were made, the labels of these questions stood in front of their
images and were asked by `<mask:0>`; half stand behind them now (`sequences.episodes`). All
else is as it was.
"""

from ml_collections import ConfigDict

from configs import flagworld


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "retrieval" for RA-CM3, "twin" for the model without retrieval."""
    config = flagworld.get_config(arg)
    config.init_from = "shipped:flagworld/" + ("twin" if arg == "twin" else "model")
    config.seed = 1  # another order, other masks
    config.masking.mean = 0.4
    config.masking.rotation_probability = 0.3
    config.episodes = dict(
        probability=0.1, num_ways=2, class_key="nation", num_labels=2000
    )
    config.optimizer.learning_rate = 8e-4
    config.train.num_steps = 3000
    return config
