"""The suite's verdicts, on answers that are known to be right and to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from racm3_jax.documents.flagworld import FlagworldConfig, make_nations, read_flagworld
from racm3_jax.evaluation import task_sheets
from racm3_jax.evaluation.flagworld_tasks import (
    evaluate_flagworld_tasks,
    evaluate_kshot,
    format_table,
)
from racm3_jax.evaluation.kshot import INVENTED
from racm3_jax.evaluation.task_probes import TaskProbes, TaskSettings
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
    """Answers rightly with a share of the truth: 1 always, 0 never."""

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


def test_right_answers_are_right_and_wrong_ones_wrong(probes):
    lines = []
    oracle = Oracle(probes, True)
    good, outputs = evaluate_flagworld_tasks(
        oracle, Oracle(probes, False), probes, SETTINGS, lines.append
    )
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
    assert good["kshot_image/2"].total == 5 and len(outputs["edit"]["masked"]) == 5
    assert len(lines) == 43
    bad, _ = evaluate_flagworld_tasks(
        Oracle(probes, False), None, probes, SETTINGS, lines.append
    )
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
    table = format_table(good)
    assert "| two-way classification by label, 2 examples a label | 100.0%" in table
    line = "| two-way classification by label, 2 examples a label: AUC | 1.000 |"
    assert line in table.splitlines()
    assert len(table.splitlines()) == 2 + 72


def test_a_sheet_shows_all_ways_of_a_task_beside_what_was_given(probes, tmp_path):
    _, outputs = evaluate_flagworld_tasks(
        Oracle(probes, True), Oracle(probes, False), probes, SETTINGS, lambda _: None
    )
    assert list(outputs["infill"]) == [
        f"{prompt}{end}"
        for prompt in ("masked", "in_place")
        for end in (", twin", "", ", guided")
    ]
    assert set(outputs) >= {"edit", "edit_sized", "edit_beside", "controlled_other_two"}
    task_sheets.write_task_sheets(tmp_path / "a", None, probes, outputs, 2)
    assert {path.stem for path in (tmp_path / "a").iterdir()} == set(outputs)
    few = np.asarray(Image.open(tmp_path / "a" / "infill.png"))
    edits = np.asarray(Image.open(tmp_path / "a" / "edit.png"))
    assert few.shape[1] > edits.shape[1]  # the twin's drawings, too
    task_sheets.write_task_sheets(tmp_path / "b", None, probes, outputs, 4)
    more = np.asarray(Image.open(tmp_path / "b" / "infill.png"))
    assert more.shape[0] > 1.5 * few.shape[0]
    grey = (few == 128).all(-1)
    assert (
        grey.any() and not (np.asarray(probes.tests[0].images[0]) == 128).all(-1).any()
    )
    task_sheets.write_task_sheets(tmp_path / "none", None, probes, outputs, 0)
    assert not (tmp_path / "none").exists()


def test_one_constant_answer_is_a_coin(probes):
    """Labels and their order are sampled for each question: no fixed answer helps."""
    tests = probes.tests * 24
    many = TaskProbes.__new__(TaskProbes)
    many.__dict__ |= probes.__dict__ | {"tests": tests}
    many.partners = np.tile(probes.partners, 24)
    asked = set()

    class Constant:
        """The first label, or the first of the alphabet."""

        def __init__(self, choose):
            self.choose = choose

        def classify(self, image, support, labels, shots_per_pass, by):
            assert set(labels) <= set(INVENTED) and support == []
            asked.add(labels)
            label = self.choose(labels)
            sure = np.array([0.9 if name == label else 0.1 for name in labels])
            return Classification(label, labels, sure, 1)

    for choose in (min, lambda labels: labels[0]):
        accuracy, area = evaluate_kshot(Constant(choose), many, SETTINGS, 0, "label")
        assert 0.35 < accuracy.value < 0.65
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


def test_worlds_that_cannot_be_asked_are_refused(probes):
    nations = make_nations(WORLD, "heldout")
    with pytest.raises(ValueError, match="needs two; got 1"):
        TaskProbes(nations, probes.tests[:1], [], SETTINGS)
    with pytest.raises(ValueError, match="the memory shows no document of"):
        TaskProbes(nations, probes.tests, [], SETTINGS)
