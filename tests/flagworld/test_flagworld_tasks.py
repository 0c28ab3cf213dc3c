"""The suite's scores, on answers that are known to be right or wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from racm3_jax.evaluation.kshot import INVENTED, compute_auc
from racm3_jax.flagworld import (
    FlagworldConfig,
    make_nations,
    read_flagworld,
    task_answers,
)
from racm3_jax.flagworld.settings import TaskSettings
from racm3_jax.flagworld.task_probes import TaskProbes
from racm3_jax.flagworld.task_suite import TasksSuite
from racm3_jax.generation.classification import Classification
from racm3_jax.types import Document, GenerationOutput, Retrieved, Segment

WORLD = FlagworldConfig(
    num_nations=0, num_heldout=6, documents_per_heldout=3, wave_amplitudes=(0.0,)
)
SETTINGS = TaskSettings(shots=(0, 2), num_samples=2, guidance=(3.0,), num_items=5)
NOTHING = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())


@pytest.fixture(scope="module")
def probes():
    tests = {d.metadata["nation"]: d for d in read_flagworld(WORLD, "heldout_test")}
    shown = list(read_flagworld(WORLD, "heldout_memory"))
    return TaskProbes(
        make_nations(WORLD, "heldout"), list(tests.values()), shown, SETTINGS
    )


def answer(*images, **facts):
    documents = [
        Document(str(i), (Segment(image=image),), metadata=facts)
        for i, image in enumerate(images)
    ]
    return GenerationOutput(documents, np.zeros(len(images)), NOTHING, "", 0)


class Oracle:
    """Answers correctly with probability `right`: 1 is always, 0 never."""

    retriever = None

    def __init__(self, probes, right):
        self.probes, self.right = probes, right
        wrong = probes.partners[probes.partners]  # neither the item's nor its donor's
        self.own = [t.images[0] for t in probes.tests]
        self.donors = [probes.donor(i).images[0] for i in range(len(self.own))]
        self.others = [self.own[i] for i in wrong]
        self.regions = []
        self.edits = set()

    def quantized(self):
        return Oracle(self.probes, False)

    def choose(self, images):
        return images if self.right else self.others

    def infill_batch(self, images, regions, prompts, **options):
        self.regions = regions
        assert prompts == [t.text for t in self.probes.tests]
        return [answer(x) for x in self.choose(self.own)]

    def edit_batch(self, images, regions, documents, prompts, **options):
        names = ("num_neighbours", "num_samples", "rank_by")
        self.edits.add(tuple(options[n] for n in names if n in options))
        for prompt, (document,) in zip(prompts, documents, strict=True):
            assert document.metadata["nation"] in prompt
        kept = {"codes_outside": 60, "codes_outside_kept": 60 if self.right else 30}
        return [answer(x, **kept) for x in self.choose(self.donors)]

    def continue_batch(self, prompts, demonstrations, **options):
        return [answer(x) for x in self.choose(self.donors)]

    def text_to_image_batch(self, prompts, num_samples=1, **options):
        pairs = zip(self.choose(self.own), self.others, strict=True)
        return [answer(*pair[:num_samples]) for pair in pairs]

    def classify(self, image, support, labels, shots_per_pass, by):
        same = {
            label
            for picture, label in support
            if self.probes.name_flags([picture]) == self.probes.name_flags([image])
        }
        (label,) = same or {labels[0]}
        if not self.right:
            label = labels[1 - labels.index(label)]
        sure = np.array([0.9 if name == label else 0.1 for name in labels])
        return Classification(label, labels, sure, 1)


FEW = dataclasses.replace(SETTINGS, region_prompts=("masked",), shots=(2,))


def make_suite(probes, workdir, right, twin=None, settings=SETTINGS, **options):
    record = {"right": right}
    oracle = Oracle(probes, right)
    return TasksSuite(oracle, twin, probes, settings, workdir, record, **options)


def test_right_answers_are_right_and_wrong_ones_wrong(probes, tmp_path):
    lines = []
    suite = make_suite(probes, tmp_path / "good", True, Oracle(probes, False))
    oracle, good = suite.generator, suite.run(lines.append)
    assert oracle.edits == {(), (1,), (1, SETTINGS.num_samples, "document")}
    for name in ("infill_masked/flag", "infill_in_place_guided/flag", "kshot_image/2",
                 "alone/infill_masked", "edit_masked/flag", "edit_in_place/flag",
                 "edit_in_place/codes_kept", "controlled_named/flag", "rerank/clip",
                 "controlled_other_two_guided/layout", "guidance/3",
                 "edit_in_place_beside_guided/flag", "controlled_other_beside/layout",
                 "rerank/document",
                 "document_guidance/2"):  # fmt: skip
        assert good[name].value == 1.0, name
    assert good["twin/infill_masked"].value == 0.0
    assert good["rerank/none"].value == 0.5 and good["int8/flag"].value == 0.0
    assert good["kshot_label_auc/2"] == 1.0
    assert good["kshot_image/2"].total == 5
    assert len(lines) == len(good["seconds"]) + 1 == 44
    bad = make_suite(probes, tmp_path / "bad", False).run(lines.append)
    for name in (
        "infill_masked/flag",
        "edit_in_place/flag",
        "controlled_named/flag",
        "kshot_image/2",
    ):
        assert bad[name].value == 0.0, name
    assert bad["kshot_label_auc/2"] == 0.0
    assert (
        bad["edit_in_place/codes_kept"].value == 0.5 and "twin/infill_masked" not in bad
    )
    table = suite.format_table(good)
    assert table == lines[43]
    assert "| two-way classification by label, 2 examples a label | 100.0%" in table
    line = "| two-way classification by label, 2 examples a label: AUC | 1.000 |"
    assert line in table.splitlines()
    assert len(table.splitlines()) == 2 + 72


def test_a_killed_run_resumes_at_the_stage(probes, tmp_path, monkeypatch):
    """Finished stages are not repeated; one process of several does the work."""

    def start(folder, right=True, index=0):
        process = {"process_index": index, "process_count": 2}
        suite = make_suite(probes, tmp_path / folder, right, settings=FEW, **process)
        return suite.run(lambda line: None)

    assert start("whole", index=1) is None and not (tmp_path / "whole").exists()
    whole = start("whole")
    with monkeypatch.context() as patch:
        patch.delattr(Oracle, "classify")  # comes after regions and demonstrations
        with pytest.raises(AttributeError, match="classify"):
            start("killed")
    assert not (tmp_path / "killed" / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.delattr(Oracle, "infill_batch")
        patch.delattr(Oracle, "continue_batch")
        resumed = start("killed")
    assert set(whole.pop("seconds")) == set(resumed.pop("seconds"))
    assert resumed == whole and whole["kshot_label/2"].value == 1
    with pytest.raises(ValueError, match="other settings"):
        start("killed", right=False)


def test_a_sheet_shows_all_variants_of_a_task_and_its_inputs(probes, tmp_path):
    twin, folders = Oracle(probes, False), [tmp_path / "a", tmp_path / "b"]
    for folder, count in zip(folders, (2, 4), strict=True):
        suite = make_suite(probes, folder, True, twin, num_sheet_rows=count)
        suite.run(lambda line: None)
    assert list(suite.sheets["infill"]) == [
        f"{prompt}{end}"
        for prompt in ("masked", "in_place")
        for end in (", twin", "", ", guided")
    ]
    names = {path.stem for path in (folders[0] / "samples").iterdir()}
    assert names == set(suite.sheets)
    assert names >= {"edit", "edit_sized", "edit_beside", "controlled_other_two"}
    few, more = (np.asarray(Image.open(f / "samples" / "infill.png")) for f in folders)
    edits = np.asarray(Image.open(folders[0] / "samples" / "edit.png"))
    assert few.shape[1] > edits.shape[1]  # also of the model without retrieval
    assert more.shape[0] > 1.5 * few.shape[0]
    grey = (few == 128).all(-1)
    assert (
        grey.any() and not (np.asarray(probes.tests[0].images[0]) == 128).all(-1).any()
    )


def test_a_constant_answer_is_at_chance(probes):
    """Labels and their order are sampled for each question: no fixed answer is better."""
    tests = probes.tests * 24
    many = TaskProbes.__new__(TaskProbes)
    many.__dict__ |= probes.__dict__ | {"tests": tests}
    many.partners = np.tile(probes.partners, 24)
    asked = set()

    class Constant:
        """Chooses the first label, or the first in the alphabet."""

        def __init__(self, choose):
            self.choose = choose

        def classify(self, image, support, labels, shots_per_pass, by):
            assert set(labels) <= set(INVENTED) and support == []
            asked.add(labels)
            label = self.choose(labels)
            sure = np.array([0.9 if name == label else 0.1 for name in labels])
            return Classification(label, labels, sure, 1)

    for choose in (min, lambda labels: labels[0]):
        found = task_answers.classify(Constant(choose), many, SETTINGS, 0, "label")
        assert 0.35 < found["right"].mean() < 0.65
        area = compute_auc(found["probabilities"], [0] * len(found["right"]))
        assert 0.35 < area < 0.65
    assert len(asked) > 30


def test_the_hidden_half_is_inside_the_flag(probes):
    for (left, top, right, bottom), half in zip(
        probes.flag_boxes(), probes.fly_halves(), strict=True
    ):
        assert half == ((left + right) // 2, top, right, bottom)
    assert all(probes.partners != np.arange(5))


def test_a_document_of_that_size_is_the_nearest_of_the_same_nation(probes):
    for i, test in enumerate(probes.tests):
        chosen = probes.donor_of_size(i)
        nation = probes.donor(i).metadata["nation"]
        assert chosen.metadata["nation"] == nation != probes.nation(i)
        difference = [
            sum(
                abs(a - b)
                for a, b in zip(
                    document.metadata["box"][2:], test.metadata["box"][2:], strict=True
                )
            )
            for document in [chosen, *probes.examples(int(probes.partners[i]), 99)]
        ]
        assert difference[0] == min(difference)


def test_unsuitable_worlds_are_refused(probes):
    nations = make_nations(WORLD, "heldout")
    with pytest.raises(ValueError, match="needs two; got 1"):
        TaskProbes(nations, probes.tests[:1], [], SETTINGS)
    with pytest.raises(ValueError, match="the memory shows no document of"):
        TaskProbes(nations, probes.tests, [], SETTINGS)
