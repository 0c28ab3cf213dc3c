"""10. k-shot classification in context, with meaningless labels."""

from __future__ import annotations

from collections.abc import Sequence

from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.evaluation.kshot import INVENTED, compute_auc
from racm3_jax.flagworld import make_nations, read_flagworld, task_answers
from racm3_jax.flagworld.settings import TaskSettings
from racm3_jax.flagworld.task_probes import TaskProbes
from racm3_jax.generation.classification import ClassifyBy
from racm3_jax.generation.tasks import Generator
from science.experiment import Experiment, Figures, Panel, Place
from science.worlds import open_bench, open_shipped, shipped_weights

SHOTS = (0, 1, 2, 4, 8)
SENTENCES = tuple(f"the flag of {word.capitalize()}" for word in INVENTED)
ASKED: dict[str, tuple[ClassifyBy, Sequence[str]]] = {
    "image": ("image", INVENTED),
    "label": ("label", INVENTED),
    "sentence": ("image", SENTENCES),
}


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Two nations, labels sampled for each question, `condition` examples of each.

    One example of each label per pass; passes are averaged, as in the paper.
    """
    shots = int(condition)
    bench = open_bench(seed, place)
    settings = TaskSettings(seed=seed, shots_per_pass=1)
    probes = TaskProbes(
        make_nations(bench.world, "heldout"),
        bench.tests[: place.scale.num_episodes],
        list(read_flagworld(bench.world, "heldout_memory")),
        settings,
    )
    generator = open_shipped("model")
    figures: Figures = {}
    for name, (by, words) in ASKED.items():
        found = task_answers.classify(generator, probes, settings, shots, by, words)
        figures[name] = compute_share(found["right"].tolist())
        right = [0] * len(probes.tests)
        figures[f"{name}_auc"] = compute_auc(found["probabilities"], right)
    if shots:
        figures["nearest"] = classify_by_clip(generator, probes, shots)
    return figures


def classify_by_clip(generator: Generator, probes: TaskProbes, shots: int) -> Share:
    """The label of the example with the nearest CLIP embedding, without the model."""
    assert generator.embedder is not None  # load_generator always opens one
    embed = generator.embedder.embed_images
    right = []
    for i, test in enumerate(probes.tests):
        asked = embed([test.images[0]])[0]
        own, other = (
            (embed([d.images[0] for d in probes.examples(item, shots)]) @ asked).max()
            for item in (i, probes.partners[i])
        )
        right.append(bool(own > other))
    return compute_share(right)


EXPERIMENT = Experiment(
    number=10,
    name="kshot",
    title="Can the model classify from examples whose labels mean nothing?",
    claim=(
        "k-shot classification with non-semantic labels is right in 0.53 without "
        "context, 0.78 at 1 shot and 0.90 at 8 (section 5.4)."
    ),
    conditions={str(k): f"{k} shots" for k in SHOTS},
    measure=measure,
    columns={
        "image": "invented words, by the image",
        "image_auc": "AUC by the image",
        "label": "invented words, by the label",
        "label_auc": "AUC by the label",
        "sentence": '"the flag of Dax", …, by the image',
        "sentence_auc": "AUC in a phrase",
        "nearest": "nearest example by CLIP",
    },
    panels=(
        Panel(
            "right answers of two",
            {
                "image": "by the image",
                "label": "by the label",
                "sentence": "in a phrase",
                "nearest": "by CLIP",
            },
        ),
    ),
    hours=0.2,
    reference="0",
    x_values=tuple(float(k) for k in SHOTS),
    x_title="examples a label",
    proof=("0", "2"),
    settings={"shots": list(SHOTS), "labels": list(INVENTED)} | shipped_weights(),
    notes=(
        "Two held-out nations per question; chance is 50%, and an area under the ROC "
        "curve of 0.5. Two labels are sampled for each question. More shots are more "
        "passes, whose probabilities are averaged. By the label, as in the paper: an "
        "example of each label is in the context, and the likelihoods of the labels "
        "after the image are compared, each minus the one after a grey image. By the "
        "image: the image's likelihoods are compared, each given one label and its own "
        "example (a noisy channel, arXiv 2108.04106)."
    ),
)
