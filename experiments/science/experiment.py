"""What an experiment is, and what a cell of it is measured with.

    experiment = conditions x seeds of cells;  cell -> figures by name

A seed is a world of its own (held-out nations that no model was trained on), the sampling
in it, and, where a model is trained, its initialisation, order and masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from racm3_jax.evaluation.intervals import Share

Figures = dict[str, Share | float]


class Curve(NamedTuple):
    """Values over a course; kept with a cell, drawn, and in no table."""

    x: list[float]
    y: list[float]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
      name: keeps the cells of scales apart.
      num_heldout: nations that are asked for, a seed.
      num_others: further nations of the memory, which are never asked for.
      num_trained: nations that the small models are trained on.
      num_scene_examples: pictures that the scene classifier learns from.
      max_steps: no training is longer.
      d_model: no model is wider.
      num_layers: no model has more.
      num_episodes: k-shot questions a seed.
    """

    name: str
    num_heldout: int
    num_others: int
    num_trained: int
    num_scene_examples: int
    max_steps: int
    d_model: int
    num_layers: int
    num_episodes: int


FULL = Scale("full", 100, 1000, 4000, 2000, 10**9, 10**9, 10**9, 100)
TINY = Scale("tiny", 3, 8, 12, 60, 2, 32, 1, 3)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a cell is measured.

    Attributes:
      work: keeps cells, memories and trained models.
      scale: how large everything is.
    """

    work: Path
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: figures over the conditions.

    Attributes:
      title: what the axis shows.
      figures: their names, with the words of the legend.
      percent: they are shares.
      log_scale: of the axis of the figures.
    """

    title: str
    figures: Mapping[str, str]
    percent: bool = True
    log_scale: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question to the method.

    Attributes:
      number: its place in the list.
      name: of its files, and of `--only`.
      title: the question.
      claim: what the paper says, with where it says so.
      conditions: what is compared, in the order of the table, with their titles.
      measure: (condition, seed, place) -> figures, and curves if there are some.
      columns: the figures of the table, with their titles.
      panels: of the plot.
      hours: estimated, all cells, on two quiet cores.
      settings: whatever changes the figures; cells measured with others are run anew.
      reference: the condition that the others are compared with, seed by seed.
      also_compared: further references, with the conditions that are compared with each.
      seeds: at least three.
      notes: what a reader of the table must know.
      x_values: of the conditions, where they are numbers of one kind.
      x_title: what these numbers are.
      proof: the conditions that prove the code, on the tiny scale; all paths through it.
      draw: draws another picture, from (experiment, cells, its file).
    """

    number: int
    name: str
    title: str
    claim: str
    conditions: Mapping[str, str]
    measure: Callable[[str, int, Place], Mapping[str, Share | float | Curve]]
    columns: Mapping[str, str]
    panels: tuple[Panel, ...]
    hours: float
    settings: Mapping[str, Any]
    reference: str = ""
    also_compared: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )
    seeds: tuple[int, ...] = (1, 2, 3)
    notes: str = ""
    x_values: tuple[float, ...] = ()
    x_title: str = ""
    proof: tuple[str, ...] = ()
    draw: Callable[[Any, Any, Path], None] | None = None

    @property
    def comparisons(self) -> dict[str, tuple[str, ...]]:
        """What is compared with each reference."""
        others = tuple(c for c in self.conditions if c != self.reference)
        own = {self.reference: others} if self.reference else {}
        return own | dict(self.also_compared)
