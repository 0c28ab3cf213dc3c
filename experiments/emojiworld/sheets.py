"""Sheets of an evaluation: samples, and the samples nearest to the training images."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from emojiworld.conditions import MAIN, ConditionRunner
from emojiworld.drawings import Drawings
from emojiworld.figures import Nearest
from emojiworld.world import BY_NAME
from racm3_jax.evaluation.parts import Parts
from racm3_jax.evaluation.pictures import BLANK, Panel, Row, draw_sheet, memory_panels
from racm3_jax.generation.tasks import Generator

_SHEET_ROWS = 12


class Sampled(Protocol):
    """The parts of an evaluation that sheets need; see `suite.EmojiSuite`."""

    generator: Generator
    runner: ConditionRunner
    drawings: Drawings
    items: np.ndarray
    seeds: tuple[int, ...]
    parts: Parts

    @property
    def things(self) -> list[str]: ...

    @property
    def icon_sets(self) -> list[str]: ...

    def has(self, variant: str) -> bool: ...


def draw_samples(suite: Sampled) -> np.ndarray:
    """Prompt, retrieved, with retrieval (guided), without, the vendor's own image."""
    first = suite.seeds[0]
    with_documents = f"guided-seed{first}"
    if not suite.has(with_documents):
        with_documents = f"retrieval-seed{first}"
    without = [c for c in ("baseline", "no_documents") if suite.has(f"{c}-seed{first}")]
    memory, tokenizer = suite.runner.memory, suite.generator.tokenizer
    found = suite.parts.load(with_documents) if suite.has(with_documents) else None
    plain = suite.parts.load(f"{without[0]}-seed{first}")["images"] if without else None
    rows = []
    for i in _choose_rows(suite):
        own = Panel(suite.drawings.images[suite.items[i]])
        retrieved = [Panel(BLANK)]
        if found is not None:
            retrieved = (
                memory_panels(memory, tokenizer, found["retrieved"][i]) or retrieved
            )
        drawn = Panel(BLANK if found is None else found["images"][i])
        other = Panel(BLANK if plain is None else plain[i])
        prompt = suite.runner.targets[i].text
        rows.append(Row(prompt, (retrieved, (drawn,), (other,), (own,))))
    headings = ("prompt", "retrieved", "with retrieval", "without", "own drawing")
    return draw_sheet(headings, rows)


def _choose_rows(suite: Sampled) -> list[int]:
    """Items spread over the things, of icon sets in turn."""
    sets, places = list(BY_NAME), []
    things = list(dict.fromkeys(suite.things))
    step = max(1, len(things) // _SHEET_ROWS)
    for n, thing in enumerate(things[::step][:_SHEET_ROWS]):
        own = [i for i, t in enumerate(suite.things) if t == thing]
        turned = [*sets[n % len(sets) :], *sets[: n % len(sets)]]
        places.append(min(own, key=lambda i: turned.index(suite.icon_sets[i])))
    return places


def draw_memorised(suite: Sampled, nearest: Nearest) -> np.ndarray:
    """The samples nearest to the training images, each next to the nearest one."""
    variants = [f"{c}-seed{suite.seeds[0]}" for c in MAIN]
    train = np.flatnonzero(suite.drawings.split == "train")
    rows = []
    for variant in filter(suite.has, variants):
        images = suite.parts.load(variant)["images"]
        places, similarity = nearest.find(images)
        for i in np.argsort(-similarity, kind="stable")[: _SHEET_ROWS // 2]:
            own = train[places[i]]
            text = f"{suite.runner.targets[i].text} ({variant}, {similarity[i]:.2f})"
            document = suite.drawings.documents[own]
            panels = (
                (Panel(images[i]),),
                (Panel(suite.drawings.images[own], document.text),),
            )
            rows.append(Row(text, panels))
    return draw_sheet(("prompt", "sample", "nearest of training"), rows)
