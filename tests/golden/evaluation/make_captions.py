"""Makes captions.json: tokens and scores of hard captions by pycocoevalcap (with Java).

    python tests/golden/evaluation/make_captions.py      (needs the [parity] extra, Java)

`hard_captions.txt` was written before our tokenizer was run on it; the other captions are
sampled from words with difficult punctuation.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

HERE = pathlib.Path(__file__).parent
NUM_IMAGES, NUM_REFERENCES = 520, 2
NUM_METEOR = 40  # METEOR is slow: it scores the first captions only
WORDS = [
    "a",
    "man",
    "the",
    "dog's",
    "isn't",
    "U.S.",
    "p.m.",
    "etc.",
    "Mr.",
    "St.",
    "10:30",
    "1/2",
    "well-known",
    "t-shirt,",
    "and/or",
    "$5",
    "50%",
    "don't",
    "they've",
    "he'd",
    "cat.",
    "woman",
    "The",
    "A",
    "He",
    "(two)",
    '"red"',
    "'blue'",
    "o'clock",
    "AT&T",
    "B&W",
    "3-D",
    "T.V.",
    "jr.",
    "vs.",
    "5'10\"",
    "it's",
    "dogs'",
    "--",
    "...",
    ".",
    ",",
    ";",
    ":",
    "!",
    "?",
    "1,000",
    "3.5",
    "2x4",
    "café",
    "½",
    "10am",
    "e.g.",
    "Dr.",
    "cannot",
    "gonna",
    "y'all",
    "'90s",
    "of",
    "with",
    "people,",
    "standing",
    "next",
    "to",
    "bus",
    "train",
    "No",
    "street",
    "sign",
    "that",
    "says",
    "STOP",
    "25",
    "mph",
    "7-11",
    "’",
    "“hot”",
    "–",
    "&",
    "W.",
    "x-ray",
    "1950's",
    '12"',
    "6ft.",
    "dog;",
    "cat!",
    "w/",
    "w/o",
    "in",
    "on",
    "front",
    "wave",
    "park",
    "holding",
    "a",
    "the",
    "a",
    "the",
    "of",
    "in",
]


def make_captions() -> tuple[list[str], list[list[str]]]:
    """520 candidates (the hard list first) with two references each."""
    rng = np.random.default_rng(0)
    hard = (HERE / "hard_captions.txt").read_text().splitlines()

    def sample_caption() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 13)))

    def vary(text: str) -> str:
        words = text.split()
        keep = [w for w in words if rng.random() > 0.25] or words
        return " ".join([*keep, *rng.choice(WORDS, rng.integers(0, 3))])

    candidates = [*hard, *(sample_caption() for _ in range(NUM_IMAGES - len(hard)))]
    references = [[vary(c) for _ in range(NUM_REFERENCES)] for c in candidates]
    candidates[-1] = ""
    return candidates, references


def run_java(captions: Sequence[str]) -> list[str]:
    """The raw output of the Java tokenizer, one line per caption."""
    import pycocoevalcap

    (folder,) = pycocoevalcap.__path__
    jar = os.path.join(folder, "tokenizer", "stanford-corenlp-3.4.1.jar")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "captions.txt")
        pathlib.Path(path).write_text("\n".join(captions))
        command = "java -cp {} edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase {}"
        output = subprocess.run(
            command.format(jar, path).split(), capture_output=True, check=True
        )
    return output.stdout.decode().split("\n")[: len(captions)]


def compute_reference_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """pycocoevalcap's scores, with its own tokenizer."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    def tokenize(groups: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        lines = iter(run_java([text for group in groups for text in group]))
        marks = [
            "''",
            "'",
            "``",
            "`",
            "-LRB-",
            "-RRB-",
            "-LCB-",
            "-RCB-",
            ".",
            "?",
            "!",
            ",",
            ":",
            "-",
            "--",
            "...",
            ";",
        ]
        return {
            i: [
                " ".join(w for w in next(lines).rstrip().split(" ") if w not in marks)
                for _ in group
            ]
            for i, group in enumerate(groups)
        }

    wanted, found = tokenize(references), tokenize([[c] for c in candidates])
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    _, ciders = Cider().compute_score(wanted, found)
    _, rouges = Rouge().compute_score(wanted, found)
    few = range(NUM_METEOR)
    _, meteors = Meteor().compute_score(
        {i: wanted[i] for i in few}, {i: found[i] for i in few}
    )
    return {
        "bleu": [float(x) for x in bleu],
        "cider": [float(x) for x in ciders],
        "rouge_l": [float(x) for x in rouges],
        "meteor": [float(x) for x in meteors],
    }


def main() -> None:
    candidates, references = make_captions()
    record = {
        "candidates": candidates,
        "references": references,
        "tokens": run_java(candidates),
        **compute_reference_scores(candidates, references),
    }
    path = HERE / "captions.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=0) + "\n")
    print(path, path.stat().st_size, file=sys.stderr)


if __name__ == "__main__":
    main()
