import importlib.util
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from racm3_jax.evaluation.captions import (
    compute_bleu,
    compute_cider,
    rouge_l,
    score_captions,
    score_with_java,
    strip_prefix,
)
from racm3_jax.evaluation.treebank import cut_tokens, tokenize_captions

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "evaluation"
RECORD = json.loads((GOLDEN / "captions.json").read_text())


@pytest.fixture(scope="module")
def scores():
    return score_captions(RECORD["candidates"], RECORD["references"])


def fraction_of_equal_tokens(wanted: list[str], found: list[list[str]]) -> float:
    import difflib

    equal = total = 0
    for line, tokens in zip(wanted, found, strict=True):
        expected = line.split(" ") if line else []
        matcher = difflib.SequenceMatcher(None, expected, tokens, autojunk=False)
        equal += sum(block.size for block in matcher.get_matching_blocks())
        total += max(len(expected), len(tokens))
    return equal / total


def test_a_known_sentence():
    sentence = "A man's dog can't sit (ever)."
    (tokens,) = cut_tokens([sentence])
    assert " ".join(tokens) == "a man 's dog ca n't sit -lrb- ever -rrb- ."
    (words,) = tokenize_captions([sentence])
    assert " ".join(words) == "a man 's dog ca n't sit -lrb- ever -rrb-"


def test_tokens_equal_the_java_program():
    found = cut_tokens(RECORD["candidates"])
    assert len(found) >= 500
    assert fraction_of_equal_tokens(RECORD["tokens"], found) >= 0.999


def test_whether_an_abbreviation_ends_depends_on_the_next_caption():
    assert cut_tokens(["at 5 p.m.", "A dog"])[0][-2:] == ["p.m.", "."]
    assert cut_tokens(["at 5 p.m.", "a dog"])[0][-1] == "p.m."


def test_lines_are_kept():
    assert cut_tokens([]) == []
    assert cut_tokens(["", "a\nb", ""]) == [[], ["a", "b"], []]


def test_scores_equal_pycocoevalcap(scores):
    np.testing.assert_allclose(scores.cider, RECORD["cider"], atol=1e-6)
    np.testing.assert_allclose(scores.rouge_l, RECORD["rouge_l"], atol=1e-6)
    means = scores.means()
    for n, value in enumerate(RECORD["bleu"], start=1):
        assert means[f"bleu_{n}"] == pytest.approx(value, abs=1e-6)
    assert means["cider"] == pytest.approx(np.mean(RECORD["cider"]), abs=1e-6)


def test_means_of_some_rows_depend_only_on_those_rows(scores):
    rows = np.array([3, 3, 10])
    means = scores.means(rows)
    assert means["cider"] == pytest.approx(np.mean(scores.cider[rows]))
    doubled = compute_bleu(scores.bleu_counts[3] * 2 + scores.bleu_counts[10])
    assert means["bleu_4"] == doubled[3]


def test_cider_rewards_the_rare_words_of_the_right_image():
    references = [[["a", "red", "cat"]], [["a", "blue", "dog"]], [["a", "tin", "car"]]]
    right = compute_cider([r[0] for r in references], references)
    np.testing.assert_allclose(right, 10 * 3 / 4)  # there are no 4-grams
    swapped = compute_cider([r[0] for r in references[1:] + references[:1]], references)
    assert (swapped < 0.1).all()


def test_rouge_of_a_subsequence():
    # 2 of 3 words in order: precision 2/3, recall 2/4
    value = rouge_l(["a", "b", "c"], [["a", "x", "b", "y"]])
    assert value == pytest.approx(2.44 * (2 / 3) * 0.5 / (0.5 + 1.44 * 2 / 3))


@pytest.mark.parametrize(
    ("text", "prefix", "expected"),
    [
        ("Photo of a dog", "Photo of", "a dog"),
        ("photo  of a dog", "Photo of ", "a dog"),
        ("Photo office", "Photo of", "Photo office"),
        ("a Photo of a dog", "Photo of", "a Photo of a dog"),
        ("Photo of", "Photo of", ""),
        ("a dog", "", "a dog"),
    ],
)
def test_the_words_of_the_prompt_are_not_scored(text, prefix, expected):
    assert strip_prefix(text, prefix) == expected


def test_wrong_lengths_and_missing_references_are_refused():
    with pytest.raises(ValueError, match="go together"):
        score_captions(["a"], [])
    with pytest.raises(ValueError, match="no reference caption"):
        score_captions(["a"], [[]])


def write_fake_package(folder, spice_parser):
    """`pycocoevalcap` with programs that score by the number of words."""
    for name in ("meteor", "spice"):
        (folder / "pycocoevalcap" / name).mkdir(parents=True)
        (folder / "pycocoevalcap" / name / "__init__.py").touch()
    (folder / "pycocoevalcap" / "__init__.py").touch()
    (folder / "pycocoevalcap" / "meteor" / "meteor.py").write_text(
        "import subprocess, sys\n"
        "class Meteor:\n"
        "    def __init__(self):\n"
        "        wait = [sys.executable, '-c', 'import sys; sys.stdin.read()']\n"
        "        pipes = {x: subprocess.PIPE for x in ('stdin', 'stdout', 'stderr')}\n"
        "        Meteor.last = self.meteor_p = subprocess.Popen(wait, **pipes)\n"
        "    def compute_score(self, wanted, given):\n"
        "        return 0, [len(given[i][0].split()) for i in sorted(given)]\n"
    )
    (folder / "pycocoevalcap" / "spice" / "spice.py").write_text(
        "class Spice:\n"
        "    def compute_score(self, wanted, given):\n"
        "        scores = [float('nan') if i else 0.25 for i in sorted(given)]\n"
        "        return 0, [{'All': {'f': f}} for f in scores]\n"
    )
    if spice_parser:
        parser = folder / "pycocoevalcap" / "spice" / "lib"
        parser.mkdir()
        (parser / "stanford-corenlp-3.6.0-models.jar").touch()


@pytest.mark.parametrize("spice_parser", [True, False])
def test_java_scores_need_their_programs(spice_parser, tmp_path, monkeypatch):
    captions, references = ["a dog.", "two cats run"], [["a dog"], ["cats"]]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert score_with_java(captions, references) == {}
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    for name in [n for n in sys.modules if n.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    write_fake_package(tmp_path, spice_parser)
    monkeypatch.syspath_prepend(str(tmp_path))
    scores = score_with_java(captions, references)
    assert scores["meteor"].tolist() == [2, 3]
    program = sys.modules["pycocoevalcap.meteor.meteor"].Meteor.last
    assert program.returncode is not None
    assert program.stdin.closed and program.stdout.closed and program.stderr.closed
    assert ("spice" in scores) == spice_parser
    if spice_parser:
        assert scores["spice"].tolist() == [0.25, 0]
    for name in [n for n in sys.modules if n.startswith("pycocoevalcap")]:
        del sys.modules[name]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_tokens_and_scores_live():
    if not shutil.which("java"):
        pytest.skip("needs Java")
    pytest.importorskip("pycocoevalcap")
    spec = importlib.util.spec_from_file_location(
        "make_captions", GOLDEN / "make_captions.py"
    )
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    candidates, references = golden.make_captions()
    assert len(candidates) >= 500
    found = cut_tokens(candidates)
    assert fraction_of_equal_tokens(golden.run_java(candidates), found) >= 0.999
    wanted = golden.compute_reference_scores(candidates, references)
    scores = score_captions(candidates, references)
    np.testing.assert_allclose(scores.cider, wanted["cider"], atol=1e-6)
    np.testing.assert_allclose(scores.rouge_l, wanted["rouge_l"], atol=1e-6)
    means = scores.means()
    bleu = [means[f"bleu_{n}"] for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(bleu, wanted["bleu"], atol=1e-6)
    few = len(wanted["meteor"])
    meteor = score_with_java(candidates[:few], references[:few])["meteor"]
    np.testing.assert_allclose(meteor, wanted["meteor"], atol=1e-6)
    for name in ("cider", "rouge_l", "bleu"):  # the golden file has these captions
        np.testing.assert_allclose(wanted[name], RECORD[name], atol=1e-6)
