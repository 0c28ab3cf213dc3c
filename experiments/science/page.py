"""Generates experiments/README.md, the summary of all experiments.

Tables come from the committed results, conclusions from `CONCLUSIONS`, which are written
by hand after an experiment and shown only with its results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from science.conclusions import ANSWERS, CONCLUSIONS
from science.experiment import FULL, Experiment

HEAD = """\
# Does retrieval do what the paper says?

Ten questions about RA-CM3 ([arXiv 2211.12561](https://arxiv.org/abs/2211.12561)),
tested on flagworld: a synthetic world of nations, each with an invented name that does
not predict its flag. The tested nations were in no model's training, only in the
memory. So whether a flag or a name is right is decided exactly, by a program that knows
the world, without another model.

```bash
python experiments/run_all.py                             # state and time of each
python experiments/run_all.py --run                       # what is missing, in order
taskset -c 0 python experiments/run_all.py --run --seeds=1 # a core per seed: 1.3x as fast
python experiments/run_all.py --run --only=num_documents  # one of them
python experiments/run_all.py --run --tiny --out=out/tiny # proves the code on a small world
python experiments/run_all.py --page                      # writes this page again
```

An interrupted run resumes. Every experiment has at least three seeds; each seed has its
own world, with {num_heldout} held-out nations, {num_documents:,} documents in the
memory unless a row says otherwise, and its own sampling; where a model is trained, also
its own initialisation and data order. Brackets are 95% intervals: Student's t over the
seeds; for fractions the wider, at each end, of that and Wilson's over all outcomes. The
plots show them as bars, and each seed as a small circle. Images are sampled at
temperature 0.5, top-p 0.9; "guided" means guidance with weight 2 against generation
without the documents; captions are greedy. Experiments 1, 2, 9, 10 and half of 5 tested
the shipped models of before (3.6 million parameters, configs/flagworld.py, which copy
their first document); the models that are shipped now, which choose, are measured in
results/README.md, and a run asks them. The others train small ones from scratch, with
documents as the retriever finds them, in an easier world (flags of one size, not waving,
at two heights), so that all of them together take hours on two cores, not days. FID is
computed on our own features, and is comparable only within a table.
"""

# For experiments with the shipped models, whose weights are among their settings.
ONE_PAIR = (
    "All seeds that test the shipped models share the same trained pair: their "
    "intervals are over worlds, questions and samples, not over trainings."
)
TAIL = """\
## The other files here

`bench_*.py` measure speed, and `speed_table.py` makes the table of their records in
`results/README.md`; `faults.py`, `memory_faults.py` and `checkpoint_faults.py`
test robustness to faults; each has its description and usage in its first lines.
`make_shipped_weights.py` trains the shipped weights again, from scratch.
`emojiworld/` tests generation of real emoji of held-out things: see its README.md.
"""


def format_page(experiments: Sequence[Experiment], results: Path) -> str:
    """The whole page."""
    num_documents = 8 * FULL.num_heldout + 4 * FULL.num_others
    head = HEAD.format(num_heldout=FULL.num_heldout, num_documents=num_documents)
    parts = [head, _overview(experiments, results)]
    parts += [_section(experiment, results) for experiment in experiments]
    return "\n".join([*parts, TAIL])


def _overview(experiments: Sequence[Experiment], results: Path) -> str:
    lines = ["| | question | answer | hours |", "|---|---|---|---|"]
    total = 0.0
    for experiment in experiments:
        record = _read(experiment, results)
        if record is None:
            answer, hours = "not run yet", f"{experiment.hours:.1f} estimated"
            total += experiment.hours
        else:
            done, cells = record["cells_done"], record["cells"]
            answer = ANSWERS.get(experiment.name, "")
            if done < cells or not answer:
                answer = f"{done} of {cells} cells measured"
            taken = record["two_core_hours"]
            hours = f"{taken:.2f}"
            total += taken
            if done < cells:
                hours += f" of {experiment.hours:.1f} estimated"
                total += max(0.0, experiment.hours - taken)
        place = f"#{experiment.number}-{_anchor(experiment.title)}"
        lines.append(
            f"| {experiment.number} | [{experiment.title}]({place}) | {answer} | {hours} |"
        )
    lines.append(f"| | all | | {total:.1f} |")
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """The anchor of a heading on GitHub."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _section(experiment: Experiment, results: Path) -> str:
    record = _read(experiment, results)
    parts = [
        f"## {experiment.number}. {experiment.title}",
        f"**The paper:** {experiment.claim}",
        f"`python experiments/run_all.py --run --only={experiment.name}`",
    ]
    if record is None:
        parts.append(
            f"**Not run yet** (estimated {experiment.hours:.1f} hours). Compared are: "
            + "; ".join(experiment.conditions.values())
            + ". Measured are: "
            + ", ".join(experiment.columns.values())
            + "."
        )
        if experiment.notes:
            parts.append(experiment.notes)
        return "\n\n".join(parts) + "\n"
    text = (results / f"{experiment.name}.md").read_text()
    parts.append(text.split("\n", 2)[2].strip())
    if "model" in experiment.settings:
        parts.append(ONE_PAIR)
    folder = results.name
    for picture in sorted(results.glob(f"{experiment.name}*.png")):
        parts.append(f"![{experiment.title}](results/{folder}/{picture.name})")
    if record["cells_done"] < record["cells"]:
        parts.append("Rows that are missing, or have fewer seeds, are not run yet.")
    conclusion = CONCLUSIONS.get(experiment.name)
    if conclusion:
        parts.append(f"**What follows:** {conclusion}")
    rerun = results / f"rerun_{experiment.name}.json"
    if rerun.exists():
        found = json.loads(rerun.read_text())
        parts.append(
            f"**Rerun** with seeds {found['rerun_seeds']} (other worlds, other samples): "
            f"{found['agreeing']} of {found['compared']} figures agree within their "
            f"intervals ([table](results/{folder}/{rerun.stem}.md))."
        )
    return "\n\n".join(parts) + "\n"


def _read(experiment: Experiment, results: Path) -> dict | None:
    path = results / f"{experiment.name}.json"
    return json.loads(path.read_text()) if path.exists() else None
