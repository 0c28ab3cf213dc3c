"""The definition of an experiment, and of how a cell is measured.

    experiment = conditions x seeds cells;  cell -> results by name

Each seed has its own world (held-out nations that no model was trained on), sampling,
and, where a model is trained, initialisation, data order and masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from racm3_jax.evaluation.intervals import Share

Figures = dict[str, Share | float]


class Curve(NamedTuple):
    """A curve, stored with a cell and plotted, but not in a table."""

    x: list[float]
    y: list[float]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of an experiment.

    Attributes:
      name: separates the cells of scales.
      num_heldout: tested nations per seed.
      num_others: other nations in the memory, never tested.
      num_trained: training nations of the small models.
      num_scene_examples: training images of the scene classifier.
      max_steps: maximum training steps.
      d_model: maximum width.
      num_layers: maximum number of layers.
      num_episodes: k-shot questions per seed.
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
    """Where and at which scale a cell is measured.

    Attributes:
      work: folder of cells, memories and trained models.
      scale: the sizes.
    """

    work: Path
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: results over the conditions.

    Attributes:
      title: of the axis.
      figures: their names, with legend labels.
      percent: whether they are fractions.
      log_scale: of the results' axis.
    """

    title: str
    figures: Mapping[str, str]
    percent: bool = True
    log_scale: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question about the method.

    Attributes:
      number: its place in the list.
      name: of its files, and for `--only`.
      title: the question.
      claim: the paper's claim, with its section.
      conditions: compared conditions, in table order, with their titles.
      measure: (condition, seed, place) -> results, and curves if any.
      columns: the results in the table, with their titles.
      panels: of the plot.
      hours: estimate for all cells, on two idle cores.
      settings: all that affects the results; cells with other settings are run again.
      reference: the condition with which the others are compared, seed by seed.
      also_compared: more references, with the conditions compared with each.
      seeds: at least three.
      notes: explanations of the table.
      x_values: of the conditions, if they are numbers.
      x_title: what these numbers are.
      proof: conditions that test all code paths, on the tiny scale.
      plot_curves: makes another plot, from (experiment, cells, its file).
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
    plot_curves: Callable[[Any, Any, Path], None] | None = None

    @property
    def comparisons(self) -> dict[str, tuple[str, ...]]:
        """The conditions compared with each reference."""
        others = tuple(c for c in self.conditions if c != self.reference)
        own = {self.reference: others} if self.reference else {}
        return own | dict(self.also_compared)
