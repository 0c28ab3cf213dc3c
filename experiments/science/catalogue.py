"""All experiments, in the order of the page."""

from __future__ import annotations

from science import (
    alpha,
    gains,
    kshot,
    memory_changes,
    modality,
    num_documents,
    rotation,
    scratch,
    sizes,
    strategy,
)
from science.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = tuple(
    module.EXPERIMENT
    for module in (
        gains,
        num_documents,
        alpha,
        strategy,
        modality,
        scratch,
        sizes,
        rotation,
        memory_changes,
        kshot,
    )
)
