"""What a finished run of the likelihood suite comes to: figures, a table, a sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from racm3_jax.evaluation.copying import compute_copy_sums
from racm3_jax.evaluation.intervals import bootstrap
from racm3_jax.evaluation.kshot import compute_accuracy, compute_auc
from racm3_jax.evaluation.likelihood_protocol import (
    EMBEDDED,
    RECALL,
    LikelihoodProtocol,
)
from racm3_jax.evaluation.perplexity import Likelihoods, ModalitySums
from racm3_jax.evaluation.pictures import Panel, Row
from racm3_jax.evaluation.retrieval import (
    chance_recall,
    document_recall,
    pair_recall,
)
from racm3_jax.evaluation.runner import save_sheet, write_results, write_table

_QUERY_NAMES = {"text": "text_to_document", "image": "image_to_document"}


def evaluate_likelihood(
    protocol: LikelihoodProtocol, log: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Runs the suite to its end; the same call resumes.

    Writes `results.json`, `table.md` and `samples.png` into the work directory.

    Returns:
      The figures by name, or None in a process other than the first, which has done its
      share.
    """
    protocol.run(log)
    if not protocol.is_first:
        return None
    protocol.wait(log)
    workdir = protocol.parts.workdir
    likelihoods = {v: load_likelihoods(protocol, v) for v in protocol.settings.variants}
    results: dict[str, Any] = {}
    for variant, found in likelihoods.items():
        results |= _language_figures(protocol, variant, found)
    results |= _shot_figures(protocol)
    results |= _recall_figures(protocol)
    results["num_near_duplicates_purged"] = protocol.num_purged
    write_results(
        workdir, results, protocol.record | {"run": protocol.parts.fingerprint}
    )
    write_table(workdir, format_table(protocol, results))
    _write_sheet(protocol, likelihoods)
    return results


def load_likelihoods(protocol: LikelihoodProtocol, variant: str) -> Likelihoods:
    """What the chunks of a variant say of all documents."""
    columns = protocol.parts.load(variant)
    retrieved = columns.pop("retrieved")
    if variant == "copy":
        sums = compute_copy_sums(columns, protocol.tokenizer.vocab)
    else:
        sums = ModalitySums(**columns)
    return Likelihoods(sums, retrieved)


def _language_figures(
    protocol: LikelihoodProtocol, variant: str, found: Likelihoods
) -> dict[str, Any]:
    figures: dict[str, Any] = dict(
        bootstrap(
            found.means,
            len(protocol.documents),
            num_resamples=protocol.settings.num_resamples,
            seed=protocol.settings.seed,
        )
    )
    figures["num_retrieved"] = found.num_retrieved
    return {f"{variant}/{name}": value for name, value in figures.items()}


def _shot_figures(protocol: LikelihoodProtocol) -> dict[str, Any]:
    """Accuracy of the model, of copying the nearest image, and with others shown."""
    if protocol.shot_parts is None:
        return {}
    results: dict[str, Any] = {
        "kshot/chance": 1 / protocol.settings.num_ways,
    }
    for shots, episodes in protocol.episodes.items():
        found = protocol.shot_parts.load(f"kshot-{shots}")
        accuracy = compute_accuracy(episodes, found["chosen"].tolist())
        results[f"kshot/{shots}/model"] = accuracy
        answers = [episode.answer for episode in episodes]
        results[f"kshot/{shots}/auc"] = compute_auc(found["probabilities"], answers)
        if shots:
            nearest = compute_accuracy(episodes, found["nearest"].tolist())
            results[f"kshot/{shots}/copy"] = nearest
            misled = protocol.shot_parts.load(f"kshot-{shots}-random")["chosen"]
            accuracy = compute_accuracy(episodes, misled.tolist())
            results[f"kshot/{shots}/random"] = accuracy
    return results


def _recall_figures(protocol: LikelihoodProtocol) -> dict[str, Any]:
    """Recall@k with what even draws would reach.

    Among the test documents (text to image, image to text), and from a test document to
    a right one in the memory; documents that lack a part, or have no right one, are left
    out.
    """
    embedded, results = protocol.parts.load(EMBEDDED), {}
    both = np.flatnonzero(embedded["has_text"] & embedded["has_image"])
    ks = protocol.settings.recall_ks
    pairs = {"text_to_image": ("text", "image"), "image_to_text": ("image", "text")}
    for name, (query, candidates) in pairs.items():
        if len(both):
            shares = pair_recall(embedded[query][both], embedded[candidates][both], ks)
            for k, share in shares.items():
                results[f"recall/{name}@{k}"] = share
                results[f"recall/{name}@{k}/chance"] = min(k, len(both)) / len(both)
    searched = protocol.parts.load(RECALL)
    for query, name in _QUERY_NAMES.items():
        there = np.flatnonzero(embedded[f"has_{query}"])
        rows = [i for i in there if protocol.right[i]]
        right = [protocol.right[i] for i in rows]
        for k in ks if rows else ():
            results[f"recall/{name}@{k}"] = document_recall(
                searched[query][rows].tolist(), right, k
            )
            results[f"recall/{name}@{k}/chance"] = chance_recall(
                protocol.memory.num_allowed, right, k
            )
    return results


def format_table(protocol: LikelihoodProtocol, results: dict[str, Any]) -> str:
    """Three tables: language modelling, k-shot, the retriever."""

    def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, names in rows.items():
            cells = (results.get(n, "-") for n in names)
            shown = (f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells)
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        return [*lines, ""]

    variants = list(protocol.settings.variants)
    figures = dict.fromkeys(
        name.partition("/")[2] for name in results if name.startswith(tuple(variants))
    )
    lines = table(
        f"{len(protocol.documents)} documents",
        variants,
        {figure: [f"{v}/{figure}" for v in variants] for figure in figures},
    )
    if protocol.shot_parts is not None:
        columns = ["model", "auc", "random", "copy"]
        lines += table(
            f"accuracy, {protocol.settings.num_ways} labels",
            [*columns, "chance"],
            {
                f"{shots} shots": [
                    *(f"kshot/{shots}/{column}" for column in columns),
                    "kshot/chance",
                ]
                for shots in protocol.episodes
            },
        )
    recalls = [n for n in results if n.startswith("recall/") and "/chance" not in n]
    lines += table(
        "the retriever",
        ["recall", "chance"],
        {n.removeprefix("recall/"): [n, f"{n}/chance"] for n in recalls},
    )
    lines.append(f"near-duplicates purged from the memory: {protocol.num_purged}")
    return "\n".join(lines)


def _write_sheet(
    protocol: LikelihoodProtocol, likelihoods: dict[str, Likelihoods]
) -> None:
    """Text | image, with its bits by each variant | what was put before it."""
    shown = [v for v in ("retrieval", "random", "copy") if v in likelihoods]
    chosen = [i for i, d in enumerate(protocol.documents) if d.images]
    rows = []
    for i in chosen[: protocol.settings.num_sheet_rows]:
        document = protocol.documents[i]
        bits = "; ".join(
            f"{variant} {_bits(found, i):.0f} bits"
            for variant, found in likelihoods.items()
        )
        groups = [[Panel(document.images[0], bits)]]
        groups += [
            _retrieved_panels(protocol, likelihoods[v].retrieved[i]) for v in shown
        ]
        rows.append(Row(document.text, groups))
    if rows:
        path = protocol.parts.workdir / "samples.png"
        save_sheet(path, ("text", "image", *shown), rows)


def _bits(found: Likelihoods, row: int) -> float:
    """Bits of a document's image."""
    return found.means(np.array([row])).get("bits_per_image", 0.0)


def _retrieved_panels(
    protocol: LikelihoodProtocol, rows: Int[np.ndarray, " k"]
) -> list[Panel]:
    documents = protocol.memory.documents(rows[rows >= 0])
    decoded = [protocol.tokenizer.decode(document) for document in documents]
    return [Panel(d.images[0], d.text) for d in decoded if d.images]
