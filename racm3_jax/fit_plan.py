"""What `racm3 fit` decides before it trains: sizes, held-out groups, and whether it can.

    source -> inspect_source -> choose_plan -> plan.json        what the user gave wins

The plan is kept in the work directory, so that the same command resumes with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax

from racm3_jax import own_files
from racm3_jax.documents.ahead import count_cores
from racm3_jax.documents.readers import find_shards, read_documents
from racm3_jax.documents.sources import Corpus, parse_sources, source_corpus
from racm3_jax.types import Document

PLAN_NAME = "plan.json"
SIZES = (64, 128, 256)
# Number of records whose images are measured before choosing sizes.
_NUM_MEASURED = 100


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the three trainings; each is a flag of `racm3 fit`.

    Attributes:
      image_size: side in pixels: 64, 128 or 256; a code covers 8x8 pixels.
      num_codes: of the image tokenizer.
      d_model: width of the generator, a multiple of 64.
      num_layers: of the generator.
      batch_size: images per tokenizer step, pairs per CLIP step.
      num_variants: augmented versions of each image for the generator, besides the
        original.
      tokenizer_steps: at most; each training stops when its held-out loss no longer
        falls.
      clip_steps: at most.
      generator_steps: at most.
    """

    image_size: int
    num_codes: int
    d_model: int
    num_layers: int
    batch_size: int
    num_variants: int
    tokenizer_steps: int
    clip_steps: int
    generator_steps: int

    def __post_init__(self) -> None:
        if self.image_size not in SIZES:
            raise ValueError(
                f"--image_size is {self.image_size}; it must be 64, 128 or 256"
            )
        if self.d_model % 64:
            raise ValueError(
                f"--d_model is {self.d_model}; it must be a multiple of 64"
            )


@dataclasses.dataclass(frozen=True)
class SourceStats:
    """Statistics of a source.

    Attributes:
      count: number of records.
      side: shorter side of the median image, in pixels.
    """

    count: int
    side: int


def inspect_source(source: str) -> SourceStats:
    """Counts the records of a source and measures the first images.

    Raises:
      ValueError: no image among the first records.
    """
    places = [place for place, _ in parse_sources(source)]
    count = sum(
        sum(1 for _ in shard.open()) for place in places for shard in find_shards(place)
    )
    first = itertools.chain.from_iterable(map(read_documents, places))
    sides = [
        min(image.shape[:2])
        for document in itertools.islice(first, _NUM_MEASURED)
        for image in document.images
    ]
    if not sides:
        raise ValueError(
            f"--source={source} has no image in its first {_NUM_MEASURED} documents: "
            "give a folder of images with captions"
        )
    return SourceStats(count, int(statistics.median(sides)))


def choose_plan(stats: SourceStats, cores: int, accelerated: bool) -> Plan:
    """Sizes for these images on this machine.

    On a CPU most of the time is the image tokenizer's: 1.45 s a step of 13 images of 128
    pixels on two cores without AVX-512, 26 minutes for all of them, held-out images included. With more than a few
    thousand images, each is seen less often, or at 64 pixels.
    """
    fitting = [size for size in SIZES if size <= max(stats.side, SIZES[0])]
    largest = 256 if accelerated else 128 if stats.count <= 5000 or cores > 8 else 64
    image_size = min(fitting[-1], largest)
    is_small = stats.count < 5000
    if accelerated:
        return Plan(
            image_size=image_size,
            num_codes=1024 if is_small else 4096,
            d_model=384 if is_small else 768,
            num_layers=6 if is_small else 12,
            batch_size=64,
            num_variants=7,
            tokenizer_steps=4000 if is_small else 20_000,
            clip_steps=2000 if is_small else 10_000,
            generator_steps=4000 if is_small else 20_000,
        )
    return Plan(
        image_size=image_size,
        num_codes=512 if stats.count < 500 else 1024,
        d_model=256,
        num_layers=4,
        batch_size=16,
        num_variants=3 if is_small else 0,
        tokenizer_steps=1000,
        clip_steps=800,
        generator_steps=1000 if is_small else 3000,
    )


def choose_holdout(count: int) -> str:
    """The fraction of a tenth of the documents, about 4 to 500, for `--holdout`."""
    return f"{min(max(0.1, 4 / count), 0.5, 500 / count):.4g}"


def count_groups(source: str, group_key: str, holdout: str, enough: int) -> int:
    """The number of groups to train on, with an image and a caption; at most `enough`.

    Raises:
      ValueError: no image has a caption, or fewer than two groups are for training or
        held out.
    """
    corpus = source_corpus(source, group_key, holdout)
    num_train = _count(corpus, corpus.train(), max(enough, 2))
    num_heldout = _count(corpus, corpus.heldout(), 2)
    what = f"groups by {group_key}" if group_key else "images"
    if not num_train + num_heldout:
        raise ValueError(
            f"--source={source} has no image with a caption: write captions next to the "
            "images (cat.jpg, cat.txt) or into a table (captions.csv)"
        )
    for number, purpose in ((num_train, "for training"), (num_heldout, "held out")):
        if number < 2:
            raise ValueError(
                f"with --holdout={holdout}, {number} captioned {what} are {purpose}; at "
                "least 2 are needed: change --holdout, or add images with captions"
            )
    return min(num_train, enough)


def _count(corpus: Corpus, documents: Iterable[Document], enough: int) -> int:
    found = set()
    for document in documents:
        if document.text.strip() and document.images:
            found.add(corpus.group(document))
            if len(found) == enough:
                break
    return len(found)


def decide(
    workdir: Path,
    source: str,
    group_key: str,
    holdout: str,
    sizes: Mapping[str, int],
    say: Callable[[str], None],
) -> tuple[dict[str, str], Plan]:
    """The plan of a work directory: made by the first call, reused afterwards.

    Raises:
      ValueError: the first call had other settings.
    """
    path = workdir / PLAN_NAME
    data = {"source": source, "group_key": group_key, "holdout": holdout}
    if path.exists():
        own_files.check(path, key="plan", change="give another --workdir")
        kept = json.loads(path.read_text(encoding="utf-8"))
        asked = data | dict(sizes)
        known = kept["asked"] | kept["plan"]
        changed = [name for name, value in asked.items() if known.get(name) != value]
        if changed:
            raise ValueError(
                f"{workdir} was started with another --{changed[0]} "
                f"({known.get(changed[0])!r}): give that again, or another --workdir"
            )
        say(f"resuming with {path}")
        return kept["data"], Plan(**kept["plan"])
    stats = inspect_source(source)
    accelerated = jax.default_backend() != "cpu"
    cores = count_cores()
    plan = choose_plan(stats, cores, accelerated)
    plan = dataclasses.replace(plan, **sizes)
    asked = dict(data)
    if not holdout:
        data["holdout"] = choose_holdout(stats.count)
    plan = _with_possible_batch(plan, data, "batch_size" in sizes)
    machine = jax.devices()[0].device_kind if accelerated else f"{cores} cores"
    say(
        f"{stats.count:,} documents, images of about {stats.side} pixels, "
        f"{machine}: sizes follow from them unless given"
    )
    chosen = {"holdout": data["holdout"]} | dataclasses.asdict(plan)
    for name, value in chosen.items():
        say(f"  --{name}={value}")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"asked": asked, "data": data, "plan": dataclasses.asdict(plan)}
    own_files.write_json(path, record)
    return data, plan


def _with_possible_batch(plan: Plan, data: Mapping[str, str], is_given: bool) -> Plan:
    """The plan with a batch of as many images as there are, if they are few.

    Raises:
      ValueError: the given batch is larger, or see `count_groups`.
    """
    num_groups = count_groups(**data, enough=plan.batch_size)
    if num_groups == plan.batch_size:
        return plan
    if is_given:
        raise ValueError(
            f"--batch_size is {plan.batch_size}, but only {num_groups} captioned images "
            "of different groups are for training: give a number up to that"
        )
    # Equal parts for all devices.
    devices = jax.device_count()
    batch_size = max(num_groups // devices, 1) * devices
    return dataclasses.replace(plan, batch_size=batch_size)


@contextlib.contextmanager
def plan_dropped_if_refused(workdir: Path) -> Iterator[None]:
    """Removes a new plan if no training was started with it.

    So that a corrected command is not refused.
    """
    plan, used = workdir / PLAN_NAME, workdir / "tokenizer" / "config.json"
    was_made, was_new = workdir.exists(), not plan.exists()
    was_used = used.exists()
    try:
        yield
    except (ValueError, OSError):
        if was_new and used.exists() == was_used:
            with contextlib.suppress(OSError):
                plan.unlink()
                if not was_made:
                    workdir.rmdir()  # if it is empty
        raise
