"""9. Changes of the memory: more, fewer, outdated and misleading documents."""

from __future__ import annotations

import dataclasses
import shutil

from racm3_jax.evaluation.intervals import compute_share
from racm3_jax.flagworld import read_flagworld
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Document
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import Sampling, generate_images, judge_outputs, measure_recall
from science.worlds import (
    Bench,
    open_bench,
    open_judge,
    open_shipped,
    seed_world,
    shipped_weights,
)

# Other nations in the memory, 4 documents each.
SIZES = {"nations_0": 0, "nations_1000": 1000, "nations_4000": 4000}
# Documents of each tested nation.
DEPTHS = {"documents_1": 1, "documents_2": 2, "documents_4": 4}
# Of 8 documents per nation, how many show its old flag, and its new one.
MIXTURES = {
    "stale": (8, 0),
    "added": (8, 8),
    "mislead_2": (6, 2),
    "mislead_4": (4, 4),
    "updated": (0, 8),
}
REMOVALS = {"removed_half": 0.5, "removed_all": 1.0}


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Images with a changed memory."""
    if condition in MIXTURES:
        return _measure_mixture(*MIXTURES[condition], seed, place)
    if condition in REMOVALS:
        return _measure_removal(REMOVALS[condition], condition, seed, place)
    changes = {}
    if condition in SIZES:
        changes["num_nations"] = min(SIZES[condition], 10 * place.scale.num_others)
    else:
        changes["documents_per_heldout"] = DEPTHS[condition]
    return _generate_images(open_bench(seed, place, **changes), seed)


def _generate_images(bench: Bench, seed: int) -> Figures:
    generator = bench.over_memory(open_shipped("model"))
    outputs = generate_images(generator, bench, seed, sampling=Sampling())
    return {**judge_outputs(outputs, bench), **measure_recall(outputs, bench)}


def _measure_removal(share: float, condition: str, seed: int, place: Place) -> Figures:
    """Removes documents of each nation permanently, in a copy of the memory on disk."""
    bench = open_bench(seed, place)
    folder = place.work / place.scale.name / "removed" / f"{condition}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.memory.path, folder)
    memory = Memory.load(folder)
    # The model is opened before, and used after the removal, which has immediate
    # effect.
    generator = bench.over_memory(open_shipped("model"), memory=memory)
    shown = read_flagworld(bench.world, "heldout_memory")
    doomed = [d.id for i, d in enumerate(shown) if i % 8 < 8 * share]
    memory.remove(memory.find(doomed))
    outputs = generate_images(generator, bench, seed, sampling=Sampling())
    gone = set(doomed)
    figures = {**judge_outputs(outputs, bench), **measure_recall(outputs, bench)}
    figures["removed_shown"] = compute_share(
        [any(d.id in gone for d in output.retrieved.documents) for output in outputs]
    )
    shutil.rmtree(folder)
    return figures


def _measure_mixture(old: int, new: int, seed: int, place: Place) -> Figures:
    """Every nation has a new flag; the memory shows `old` and `new` documents of it.

    "flag" is the old one, "new_flag" the new one.
    """
    world = seed_world(seed, place)
    changed = dataclasses.replace(world, swap_flags=True)
    documents = [
        *_first_of_each(list(read_flagworld(world, "heldout_memory")), old, ""),
        *_first_of_each(list(read_flagworld(changed, "heldout_memory")), new, "new-"),
        *read_flagworld(world, "train"),
    ]
    bench = open_bench(seed, place, documents=documents)
    generator = bench.over_memory(open_shipped("model"))
    outputs = generate_images(generator, bench, seed, sampling=Sampling())
    images = [output.images[0] for output in outputs]
    return {
        **judge_outputs(outputs, bench),
        "new_flag": compute_share(
            open_judge(changed, bench.tests, place).flag_verdicts(images)
        ),
        **measure_recall(outputs, bench),
    }


def _first_of_each(
    documents: list[Document], count: int, prefix: str
) -> list[Document]:
    """The first documents of each nation; names of new ones begin with a prefix."""
    kept: dict[str, int] = {}
    chosen = []
    for document in documents:
        nation = document.metadata["nation"]
        if kept.get(nation, 0) < count:
            kept[nation] = kept.get(nation, 0) + 1
            chosen.append(dataclasses.replace(document, id=prefix + document.id))
    return chosen


EXPERIMENT = Experiment(
    number=9,
    name="memory_changes",
    title="What happens when the memory grows, shrinks, goes stale, or misleads?",
    claim=(
        "Knowledge lives in the memory, which can be extended and corrected without "
        "training (section 1); the paper does not measure how images follow changes."
    ),
    conditions={
        "nations_0": "8 documents of each nation asked for, no others",
        "nations_1000": "+ 4,000 documents of 1,000 other nations",
        "nations_4000": "+ 16,000 documents of 4,000 other nations",
        "documents_1": "1 document of each nation (4,000 others)",
        "documents_2": "2 documents of each nation",
        "documents_4": "4 documents of each nation",
        "removed_half": "4 of 8 documents of each nation removed",
        "removed_all": "all documents of each nation removed",
        "stale": "the flag changed, the memory did not (8 old documents)",
        "mislead_2": "6 old, 2 new documents",
        "mislead_4": "4 old, 4 new documents",
        "added": "8 old, 8 new documents: added, nothing removed",
        "updated": "8 new documents: old ones removed",
    },
    measure=measure,
    columns={
        "flag": "flag right (old flag)",
        "new_flag": "new flag generated",
        "scene": "scene right",
        "recall": "a document of the nation retrieved",
        "removed_shown": "a removed document was shown",
    },
    panels=(
        Panel("flag generated", {"flag": "old flag", "new_flag": "new flag"}),
        Panel("retrieved", {"recall": "a document of the nation"}),
    ),
    hours=0.2,
    reference="nations_1000",
    proof=("nations_0", "documents_1", "removed_half", "added"),
    settings={
        "sizes": SIZES,
        "depths": DEPTHS,
        "mixtures": {k: list(v) for k, v in MIXTURES.items()},
        "removals": REMOVALS,
    }
    | shipped_weights(),
    notes=(
        "The weights are the same in all rows. Misleading and new documents are the "
        "same case from two perspectives: the memory defines which flag is right."
    ),
)
