"""The loss weight of retrieved documents, at two learning rates.

racm3 sweep --config=configs/sweeps/flagworld_alpha.py --workdir=out/alpha
racm3 sweep --config=configs/sweeps/flagworld_alpha.py:tiny --workdir=out/alpha_tiny
"""

from ml_collections import ConfigDict

from configs import flagworld, flagworld_tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" (as configs/flagworld.py, shorter) or "tiny" (seconds, for tests)."""
    if arg not in ("", "tiny"):
        raise ValueError(f"unknown argument {arg!r}: use :tiny, or none")
    if arg == "tiny":
        return flagworld_tiny.get_config()
    config = flagworld.get_config()
    config.train.num_steps = 6000
    return config


def get_hyper(hyper) -> list[dict[str, float]]:
    """Four points."""
    return hyper.product(
        [
            hyper.sweep("config.pipeline.alpha", [0.1, 1.0]),
            hyper.sweep("config.optimizer.learning_rate", [1e-3, 3e-3]),
        ]
    )
