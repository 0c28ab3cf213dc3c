"""CM3 2.7B: the baseline of configs/racm3_2b7.py without retrieval, otherwise equal.

racm3 train --config=configs/cm3_2b7.py --workdir=out/cm3_2b7
"""

from ml_collections import ConfigDict

from configs import racm3_2b7


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: as in configs/racm3_2b7.py."""
    config = racm3_2b7.get_config(arg)
    config.pipeline.retrieval = False
    return config
