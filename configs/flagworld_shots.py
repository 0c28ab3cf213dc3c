"""Goes on with the flagworld models once more: captions, and k-shot labels.

    racm3 train --config=configs/flagworld_shots.py --workdir=out/racm3_shots
    racm3 train --config=configs/flagworld_shots.py:twin --workdir=out/cm3_shots

Twice the nations, so that most documents are new; half of the documents are captioned,
and three tenths are questions about two demonstrations, of which one is right.
"""

from ml_collections import ConfigDict

from configs import flagworld_tasks


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "retrieval" for RA-CM3, "twin" for the model without retrieval."""
    config = flagworld_tasks.get_config(arg)
    config.seed = 2  # another order, other masks
    config.world.num_nations = 16000
    config.masking.rotation_probability = 0.5
    config.episodes.probability = 0.3
    config.train.num_steps = 2500
    return config
