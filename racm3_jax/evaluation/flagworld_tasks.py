"""The other tasks on flagworld: infilling, editing, demonstrations, k-shot, guidance.

Every figure is over held-out nations. Verdicts are made by the flag identifier, which
knows the world and no model.

    infill      the fly half of the flag is hidden; the caption names the nation
    edit        the flag's box is generated again, a document of another nation is chosen: any,
                or one that shows its flag about as large as the box ("sized"), or any
                and after it the most similar one of the memory ("beside")
                (both by the CM3 mask, "masked", and in the image's order, "in_place")
    controlled  one document of another nation, or two ("two"), or one and what the memory
                holds like it ("beside"), stand in front instead of retrieved ones; the
                prompt names that nation ("named") or its own ("other")
    kshot       two nations, labels without meaning, k examples of each in context (by how
                likely the "image" is after a label and its examples, or by the "label")
    guidance    the plain drawing task at several weights
    int8        the plain drawing task with weights in 8 bits
    rerank      the plain drawing task, best of n by CLIP, by likelihood, and all n; and
                of n guided edits ("beside", in place) the one most like the document
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from racm3_jax.evaluation.intervals import Share, compute_grouped_share, compute_share
from racm3_jax.evaluation.kshot import INVENTED, compute_auc
from racm3_jax.evaluation.stages import Stages
from racm3_jax.evaluation.task_probes import TaskProbes, TaskSettings
from racm3_jax.generation.classification import ClassifyBy
from racm3_jax.generation.infilling import REGION_PROMPTS, RegionPrompt
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import GenerationOutput

# Ends of the names of tasks, and how they differ.
EDITS: dict[str, dict[str, Any]] = {
    "": {},
    "_sized": {"sized": True},
    "_beside": {"num_neighbours": 1},
}
DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "_two": {"count": 2},
    "_beside": {"num_neighbours": 1},
}


def _first_images(outputs: Sequence[GenerationOutput]) -> list[np.ndarray]:
    return [output.images[0] for output in outputs]


def evaluate_infill(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    num_retrieved: int,
    region_prompt: RegionPrompt,
    **options: Any,
) -> tuple[Share, list[GenerationOutput]]:
    """Is the flag whole and right after its hidden half was drawn?"""
    outputs = generator.infill_batch(
        [test.images[0] for test in probes.tests],
        probes.fly_halves(),
        [test.text for test in probes.tests],
        num_retrieved=num_retrieved,
        max_spans=settings.max_spans,
        region_prompt=region_prompt,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        **options,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    return probes.right_flags(_first_images(outputs), names)[0], outputs


def evaluate_edit(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    region_prompt: RegionPrompt,
    sized: bool = False,
    **options: Any,
) -> tuple[Share, Share, list[GenerationOutput]]:
    """Does the region show the chosen flag, and how much of the rest is as it was?"""
    items = range(len(probes.tests))
    choose = probes.donor_of_size if sized else probes.donor
    outputs = generator.edit_batch(
        [test.images[0] for test in probes.tests],
        probes.flag_boxes(),
        [[choose(i)] for i in items],
        probes.captions_of_donors(),
        max_spans=settings.max_spans,
        region_prompt=region_prompt,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        **options,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    facts = [output.documents[0].metadata for output in outputs]
    kept = compute_grouped_share(
        [fact["codes_outside_kept"] for fact in facts],
        [fact["codes_outside"] for fact in facts],
    )
    return probes.right_flags(_first_images(outputs), names)[0], kept, outputs


def evaluate_controlled(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    *,
    named: bool,
    count: int = 1,
    **options: Any,
) -> tuple[Share, Share, list[GenerationOutput]]:
    """Does the drawing follow `count` demonstrations: their flag, and its layout?"""
    items = range(len(probes.tests))
    prompts = [test.text for test in probes.tests]
    outputs = generator.continue_batch(
        probes.captions_of_donors() if named else prompts,
        [probes.examples(int(probes.partners[i]), count) for i in items],
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        **options,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    return *probes.right_flags(_first_images(outputs), names), outputs


def evaluate_kshot(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    shots: int,
    by: ClassifyBy,
) -> tuple[Share, float]:
    """Two-way classification: accuracy, and the area under the ROC curve.

    The two labels are sampled for every question from `kshot.INVENTED`, and so is their
    order, so that a model that always answers one of them is right half of the time.
    """
    rng = np.random.default_rng([settings.seed, 1])
    right, probabilities = [], []
    for i, test in enumerate(probes.tests):
        own, other = (str(word) for word in rng.choice(INVENTED, 2, replace=False))
        support = [
            (document.images[0], label)
            for item, label in ((i, own), (probes.partners[i], other))
            for document in probes.examples(item, shots)
        ]
        found = generator.classify(
            test.images[0],
            support,
            (own, other) if rng.random() < 0.5 else (other, own),
            shots_per_pass=settings.shots_per_pass,
            by=by,
        )
        right.append(found.label == own)
        of_own = float(found.probabilities[found.labels.index(own)])
        probabilities.append([of_own, 1 - of_own])
    area = compute_auc(np.array(probabilities), [0] * len(probabilities))
    return compute_share(right), area


def evaluate_drawing(
    generator: Generator, probes: TaskProbes, settings: TaskSettings, **options: Any
) -> tuple[Share, Share]:
    """Share of best samples with the right flag, and of all samples.

    Samples for one prompt count as less than so many independent ones.
    """
    outputs = generator.text_to_image_batch(
        [test.text for test in probes.tests],
        num_retrieved=settings.num_retrieved,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        **options,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    count = len(outputs[0].images)
    every = [image for output in outputs for image in output.images]
    found = np.array(probes.name_flags(every)).reshape(len(names), count)
    right = found == np.array(names)[:, None]
    every_sample = compute_grouped_share(right.sum(1).tolist(), [count] * len(right))
    return compute_share(list(right[:, 0])), every_sample


def _evaluate_regions(
    generator: Generator,
    twin: Generator | None,
    probes: TaskProbes,
    settings: TaskSettings,
    prompt: RegionPrompt,
    guided: dict[str, Any],
    stages: Stages,
    results: dict[str, Any],
    outputs: dict[str, dict[str, list[GenerationOutput]]],
) -> None:
    """Infilling and editing by one kind of prompt; adds to results and outputs."""
    infill, edit = f"infill_{prompt}", f"edit_{prompt}"

    def fill(model: Generator, num_retrieved: int, **how: Any) -> Any:
        return evaluate_infill(model, probes, settings, num_retrieved, prompt, **how)

    results[f"alone/{infill}"], _ = stages.run(
        f"{infill}, no documents", lambda: fill(generator, 0)
    )
    if twin is not None:
        results[f"twin/{infill}"], drawn = stages.run(
            f"{infill}, twin", lambda: fill(twin, 0)
        )
        outputs.setdefault("infill", {})[f"{prompt}, twin"] = drawn
    for end, options in (("", {}), ("_guided", guided)):
        how: dict[str, Any] = options
        way = prompt + end.replace("_", ", ")
        results[f"{infill}{end}/flag"], drawn = stages.run(
            f"{infill}{end}",
            lambda how=how: fill(generator, settings.num_retrieved, **how),
        )
        outputs.setdefault("infill", {})[way] = drawn
        for kind, documents in EDITS.items():
            name = f"{edit}{kind}{end}"
            flag, kept, drawn = stages.run(
                name,
                lambda how=how | documents: evaluate_edit(
                    generator, probes, settings, prompt, **how
                ),
            )
            results |= {f"{name}/flag": flag, f"{name}/codes_kept": kept}
            outputs.setdefault(f"edit{kind}", {})[way] = drawn


def evaluate_flagworld_tasks(
    generator: Generator,
    twin: Generator | None,
    probes: TaskProbes,
    settings: TaskSettings,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Any], dict[str, dict[str, list[GenerationOutput]]]]:
    """Runs the whole suite.

    Args:
      generator: the retrieval-augmented model with its memory.
      twin: the model trained without retrieval, or None to leave it out.
      probes: what is asked.
      settings: of the sampling.
      log: receives one line a stage.

    Returns:
      (results, outputs): results are `Share`s by name and seconds by stage; outputs hold
      what was generated, by task and way of asking, for pictures.
    """
    results: dict[str, Any] = {}
    outputs: dict[str, dict[str, list[GenerationOutput]]] = {}
    stages = Stages(log)
    guided = {"guidance": settings.document_guidance[-1], "guide_documents": True}
    for prompt in settings.region_prompts:
        _evaluate_regions(
            generator, twin, probes, settings, prompt, guided, stages, results, outputs
        )
    for end, options in (("", {}), ("_guided", guided)):
        how: dict[str, Any] = options
        for name, kind in itertools.product(("named", "other"), DEMONSTRATIONS):
            task = f"controlled_{name}{kind}{end}"
            flag, layout, drawn = stages.run(
                task,
                lambda name=name, how=how | DEMONSTRATIONS[kind]: evaluate_controlled(
                    generator, probes, settings, named=name == "named", **how
                ),
            )
            results |= {f"{task}/flag": flag, f"{task}/layout": layout}
            way = "guided" if how else "plain"
            outputs.setdefault(f"controlled_{name}{kind}", {})[way] = drawn
    for by, shots in itertools.product(settings.classify_by, settings.shots):
        accuracy, area = stages.run(
            f"{shots}-shot by {by}",
            lambda shots=shots, by=by: evaluate_kshot(
                generator, probes, settings, shots, by
            ),
        )
        results[f"kshot_{by}/{shots}"] = accuracy
        results[f"kshot_{by}_auc/{shots}"] = area
    for task, weights in (
        ("guidance", (1.0, *settings.guidance)),
        ("document_guidance", settings.document_guidance),
    ):
        for weight in weights:
            results[f"{task}/{weight:g}"], _ = stages.run(
                f"{task} {weight:g}",
                lambda weight=weight, task=task: evaluate_drawing(
                    generator,
                    probes,
                    settings,
                    guidance=weight,
                    guide_documents=task == "document_guidance",
                ),
            )
    results["int8/flag"], _ = stages.run(
        "int8", lambda: evaluate_drawing(generator.quantized(), probes, settings)
    )
    n = settings.num_samples
    for rank_by in ("clip", "likelihood"):
        best, every = stages.run(
            f"best of {n} by {rank_by}",
            lambda rank_by=rank_by: evaluate_drawing(
                generator, probes, settings, num_samples=n, rank_by=rank_by
            ),
        )
        results[f"rerank/{rank_by}"] = best
        results["rerank/none"] = every  # the samples are the same
    results["rerank/document"], _, _ = stages.run(
        f"edit, best of {n} by document",
        lambda: evaluate_edit(
            generator,
            probes,
            settings,
            "in_place",
            num_samples=n,
            rank_by="document",
            **EDITS["_beside"],
            **guided,
        ),
    )
    results["seconds"] = stages.seconds
    return results, outputs


def format_table(results: dict[str, Any]) -> str:
    """The suite's figures, one line each."""
    titles = {}
    for prompt in REGION_PROMPTS:
        titles |= {
            f"alone/infill_{prompt}": f"hidden half generated {prompt}: no documents",
            f"twin/infill_{prompt}": f"hidden half generated {prompt}: trained without retrieval",
        }
    plain = {}
    for prompt in REGION_PROMPTS:
        plain |= {
            f"infill_{prompt}/flag": f"hidden half generated {prompt}: right flag",
            f"edit_{prompt}/flag": f"region generated {prompt}: the chosen document's flag",
            f"edit_{prompt}/codes_kept": f"codes outside that are kept, {prompt}",
            f"edit_{prompt}_sized/flag": f"the same, a document of that size, {prompt}",
            f"edit_{prompt}_sized/codes_kept": f"codes outside that are kept, sized, {prompt}",
            f"edit_{prompt}_beside/flag": f"any, with a similar one, {prompt}",
            f"edit_{prompt}_beside/codes_kept": f"codes outside that are kept, similar one too, {prompt}",
        }
    for name, who in (("named", "prompt names it"), ("other", "prompt names another")):
        for end, what in (
            ("", "demonstration"),
            ("_two", "two demonstrations"),
            ("_beside", "demonstration with a similar one"),
        ):
            for value in ("flag", "layout"):
                title = f"{what} followed: {value} ({who})"
                plain[f"controlled_{name}{end}/{value}"] = title
    for name, title in plain.items():
        task, _, value = name.partition("/")
        titles |= {name: title, f"{task}_guided/{value}": f"{title}, guided"}
    titles |= {
        "int8/flag": "generated flag right, weights in 8 bits",
        "rerank/none": "generated flag right, any sample",
        "rerank/clip": "generated flag right, best by CLIP",
        "rerank/likelihood": "generated flag right, best by likelihood",
        "rerank/document": (
            "any, with a similar one, in_place, guided: best by similarity to the document"
        ),
    }
    for name in results:
        task, _, value = name.partition("/")
        if task.startswith("kshot_"):
            by = task.removeprefix("kshot_").removesuffix("_auc")
            title = f"two-way classification by {by}, {value} examples a label"
            titles[name] = f"{title}: AUC" if task.endswith("_auc") else title
        if task == "guidance":
            titles[name] = f"generated flag right, guidance {value}"
        if task == "document_guidance":
            titles[name] = f"generated flag right, guidance {value} with documents"
    lines = ["| task | fraction [95% interval] |", "|---|---|"]
    for name, title in titles.items():
        if name in results:
            value = results[name]
            cell = f"{value:.3f}" if isinstance(value, float) else str(value)
            lines.append(f"| {title} | {cell} |")
    return "\n".join(lines)
