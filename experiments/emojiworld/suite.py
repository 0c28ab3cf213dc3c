"""The evaluation of emojiworld as a suite: stages, scorers, files."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emojiworld.captions import names_thing
from emojiworld.conditions import (
    CAPTIONED,
    DRAWN,
    MAIN,
    NEEDS_BASELINE,
    SCORED,
    ConditionRunner,
    swap_things,
)
from emojiworld.drawings import Drawings
from emojiworld.figures import (
    Nearest,
    combine_bits,
    combine_outcomes,
    compare_conditions,
    compute_distance,
    format_ceilings,
    format_table,
    saved_bits,
    text_to_image_ranks,
)
from emojiworld.scorers import Verdicts, open_verdicts, reconstruct
from emojiworld.sheets import draw_memorised, draw_samples
from racm3_jax import own_files
from racm3_jax.evaluation.clip_score import CLIPFeatures
from racm3_jax.evaluation.intervals import Share
from racm3_jax.evaluation.suite import Stage, Suite, to_json
from racm3_jax.generation.tasks import Generator

_SEARCH = "search"


class EmojiSuite(Suite):
    """Models, images and conditions; more seeds may be added later.

    Attributes:
      generator: with retrieval.
      runner: runs the models.
      images: all of them.
      items: positions of the tested images.
      seeds: of the sampling.
    """

    def __init__(
        self,
        workdir: Path,
        record: Mapping[str, Any],
        generator: Generator,
        runner: ConditionRunner,
        drawings: Drawings,
        items: np.ndarray,
        *,
        chunk_size: int,
        seeds: Sequence[int],
        conditions: Sequence[str],
        devices: Sequence[Any] = (None,),
    ) -> None:
        super().__init__(workdir, record, len(items), chunk_size, devices=devices)
        self.generator, self.runner = generator, runner
        self.drawings, self.items = drawings, items
        self.seeds, self._conditions = tuple(seeds), conditions

    @property
    def things(self) -> list[str]:
        return self.drawings.thing[self.items].tolist()

    @property
    def icon_sets(self) -> list[str]:
        return self.drawings.icon_set[self.items].tolist()

    def seeds_of(self, condition: str) -> tuple[int, ...]:
        """The sampling seeds of a condition."""
        return self.seeds if condition in MAIN else self.seeds[:1]

    def has(self, variant: str) -> bool:
        """Whether a stage is finished."""
        return not self.parts.missing([variant])

    def stages(self) -> list[Stage]:
        """CLIP's search, then each condition."""
        stages = [Stage(_SEARCH, self.parts, self.runner.search)]

        def add(name: str, compute: Any, *how: Any) -> None:
            stages.append(Stage(name, self.parts, functools.partial(compute, *how)))

        for condition in self._conditions:
            if condition == NEEDS_BASELINE and self.record["baseline"] is None:
                continue
            for seed in self.seeds_of(condition):
                add(
                    f"{condition}-seed{seed}",
                    self.runner.generate_images,
                    condition,
                    seed,
                )
            if condition in CAPTIONED:
                add(f"caption-{condition}", self.runner.caption, condition)
            if condition in SCORED:
                add(f"bits-{condition}", self.runner.score, condition)
        return stages

    def figures(self) -> dict[str, Any]:
        """The figures of all finished conditions, of this call or earlier ones."""
        codec, drawings = self.generator.tokenizer.image, self.drawings
        path = self.parts.workdir / "scorers.npz"
        verdicts, ceilings = open_verdicts(path, drawings, codec)
        train = drawings.split == "train"
        # Generated images are compared with real ones reconstructed by the tokenizer.
        usual = reconstruct(codec, drawings.images[~train])
        self.nearest = Nearest(drawings.images[train], list(usual))
        outcomes, rows = self._judge(verdicts, self.nearest)
        assert self.generator.embedder is not None
        differences = {
            reference: compare_conditions(
                {c: o for c, o in outcomes.items() if c != reference},
                outcomes[reference],
                self.things,
            )
            for reference in ("baseline", "copy")
            if reference in outcomes
        }
        return {
            "seeds": list(self.seeds),
            "num_items": len(self.items),
            "num_things": len(set(self.things)),
            "features": CLIPFeatures(self.generator.embedder).settings,
            "figures": rows,
            "clip": self._judge_search(),
            "differences": differences,
            "bits_saved": self._saved(),
            "similarity_of_real": self.nearest.usual,
            "scorers": ceilings,
        }

    def format_table(self, results: Mapping[str, Any]) -> str:
        """The tables of conditions, scorers and CLIP."""
        words = "; ".join(f"{name} {share}" for name, share in results["clip"].items())
        return (
            f"{format_table(results['figures'], DRAWN)}\n\n"
            "What the scorers make of held-out drawings:\n\n"
            f"{format_ceilings(results['scorers'])}\n\nCLIP: {words}.\n"
        )

    def write(self, results: Mapping[str, Any]) -> str:
        """`results.json`, `results.md`, `samples.png` and `memorised.png`."""
        folder, table = self.parts.workdir, self.format_table(results)
        record = {"settings": self.record} | to_json(results)
        own_files.write_json(folder / "results.json", record)
        own_files.write_markdown(folder / "results.md", table)
        own_files.write_png(folder / "samples.png", draw_samples(self))
        memorised = draw_memorised(self, self.nearest)
        own_files.write_png(folder / "memorised.png", memorised)
        return table

    def _judge(
        self, verdicts: Verdicts, nearest: Nearest
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, Any]]]:
        """(outcomes, figures) of every finished condition, by name."""
        assert self.generator.embedder is not None
        features = CLIPFeatures(self.generator.embedder)
        real = self.drawings.images[self.items]
        all_outcomes, rows = {}, {}
        for condition in DRAWN:
            found = [
                self._judge_cell(condition, s, verdicts, nearest)
                for s in self.seeds_of(condition)
            ]
            cells = [cell for cell in found if cell is not None]
            if not cells:
                continue
            outcomes = {n: np.stack([c[n] for c in cells]) for n in cells[0]}
            if self.has(f"caption-{condition}"):
                texts = self.parts.load(f"caption-{condition}")["text"]
                named = [
                    names_thing(str(t), g)
                    for t, g in zip(texts, self.things, strict=True)
                ]
                outcomes["named"] = np.array([named], float)
            row: dict[str, Any] = self._combine(outcomes)
            if len(self.items) > 1:
                images = self.parts.load(f"{condition}-seed{self.seeds[0]}")["images"]
                row["fid"] = compute_distance(images, real, features)
            if self.has(f"bits-{condition}"):
                bits = self.parts.load(f"bits-{condition}")["bits"]
                row["bits"] = combine_bits(bits, self.things)
            all_outcomes[condition], rows[condition] = outcomes, row
        return all_outcomes, rows

    def _judge_search(self) -> dict[str, Share]:
        """The quality of CLIP's retrieval, by kind of query."""
        found = self.parts.load(_SEARCH)
        ranks = text_to_image_ranks(found["text"], found["image"])
        outcomes = {
            "text query, right thing first": self._shown(found["by_text"][:, None]),
            "image query, right thing first": self._shown(found["by_image"][:, None]),
            "text to image, recall at 1": ranks < 1,
            "text to image, recall at 5": ranks < 5,
        }
        rows = {n: np.asarray(values, float)[None] for n, values in outcomes.items()}
        return self._combine(rows)

    def _combine(self, outcomes: Mapping[str, np.ndarray]) -> dict[str, Share]:
        """The fraction of each figure that has outcomes."""
        shares = {n: combine_outcomes(x, self.things) for n, x in outcomes.items()}
        return {name: share for name, share in shares.items() if share is not None}

    def _judge_cell(
        self, condition: str, seed: int, verdicts: Verdicts, nearest: Nearest
    ) -> dict[str, np.ndarray] | None:
        """The outcomes of one condition and seed; None if it is not finished."""
        if not self.has(f"{condition}-seed{seed}"):
            return None
        found = self.parts.load(f"{condition}-seed{seed}")
        images = found["images"]
        outcomes = verdicts.judge(images, self.icon_sets, self.things)
        if condition == "swapped":
            _, shown = swap_things(self.drawings)
            others = [shown[thing] for thing in self.things]
            followed = verdicts.judge(images, self.icon_sets, others)
            outcomes["followed"] = followed["top1"]
        elif condition != "reconstruction" and (found["retrieved"] >= 0).any():
            outcomes["shown"] = self._shown(found["retrieved"])
        outcomes["memorised"] = nearest.memorised(images)
        return outcomes

    def _shown(self, rows: np.ndarray) -> np.ndarray:
        """1 where one of the documents shows the thing."""
        facts = self.runner.memory.metadata(rows[rows >= 0])
        things = np.full(rows.shape, "", object)
        things[rows >= 0] = [str(fact.get("thing", "")) for fact in facts]
        return (things == np.array(self.things, object)[:, None]).any(1).astype(float)

    def _saved(self) -> dict[str, Any]:
        """The fraction of bits saved by documents, vs. each model without them."""
        if not self.has("bits-retrieval"):
            return {}
        bits = {
            condition: self.parts.load(f"bits-{condition}")["bits"]
            for condition in ("baseline", "no_documents", "retrieval")
            if self.has(f"bits-{condition}")
        }
        mine = bits.pop("retrieval")
        return {other: saved_bits(mine, b, self.things) for other, b in bits.items()}
