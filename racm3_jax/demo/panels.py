"""Parts of the page as HTML; all external text is escaped."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from racm3_jax.demo.desk import Desk, Earlier, Given, Stage
from racm3_jax.documents.images import encode_png
from racm3_jax.generation.classification import Classification
from racm3_jax.types import GenerationOutput

Image = UInt8[np.ndarray, "height width 3"]
_NOTHING_YET = "the image appears here while it is generated"


def draw_image(image: Image, words: str) -> str:
    """An inline image; small ones are enlarged without smoothing."""
    data = base64.b64encode(encode_png(image)).decode()
    return (
        f'<img class="pixels" alt="{_text(words)}" src="data:image/png;base64,{data}">'
    )


def draw_note(words: str, kind: str = "faint") -> str:
    """One line: faint, plain "words", or a "warning"."""
    return f'<div class="{kind}">{_text(words)}</div>' if words else ""


def draw_cards(given: Sequence[Given], actions: Sequence[str] = ()) -> str:
    """Documents as cards, with metadata and buttons."""
    return (
        '<div class="cards">'
        + "".join(_draw_card(g, actions) for g in given)
        + "</div>"
    )


def _draw_card(given: Given, actions: Sequence[str]) -> str:
    document = given.shown
    shown_image = (
        draw_image(document.images[0], document.text) if document.images else ""
    )
    score = "your own" if math.isnan(given.score) else f"score {given.score:.3f}"
    lines = [score, given.id]
    lines.append(" · ".join(part for part in (document.source, given.licence) if part))
    facts = "".join(draw_note(line) for line in lines)
    buttons = "".join(
        _draw_button(action, _label(action, given), given.id)
        for action in actions
        if not (action == "pin" and given.is_own)
    )
    kind = "card stays" if given.stays else "card"
    return (
        f'<div class="{kind}" data-document="{_text(given.id)}">{shown_image}'
        f'<div class="words">{_text(document.text)}</div>{facts}'
        f'<div class="buttons">{buttons}</div></div>'
    )


def _label(action: str, given: Given) -> str:
    if action == "pin":
        return "Unpin" if given.pinned else "Pin"
    return {"drop": "Drop", "remove": "Remove …"}[action]


def _draw_button(action: str, label: str, value: str = "") -> str:
    return (
        f'<button class="small" data-action="{action}" data-value="{_text(value)}">'
        f"{_text(label)}</button>"
    )


def draw_desk(desk: Desk) -> str:
    """The documents of a visitor, and the dropped ones."""
    if not desk.given and not desk.prompt:
        return draw_note("Find documents, or generate directly.")
    cards = draw_cards(desk.given, ("pin", "drop"))
    if not desk.given:
        cards = draw_note("No documents: the model uses only the prompt.")
    if not desk.dropped:
        return cards
    names = draw_note("dropped: " + ", ".join(desk.dropped))
    back = _draw_button("restore", "Bring back")
    return f'{cards}<div class="line dropped">{names}{back}</div>'


def draw_prompts(prompts: Sequence[str]) -> str:
    """Example prompts, one button each."""
    buttons = "".join(_draw_button("prompt", prompt, prompt) for prompt in prompts)
    return f'<div class="line"><span class="faint">try</span>{buttons}</div>'


def draw_stage(stage: Stage | None) -> str:
    """Partial or final images, with their metadata."""
    if stage is None or not stage.images:
        words = (
            _NOTHING_YET
            if stage is None
            else "reading the documents … (the first image takes longest)"
        )
        return f'<div class="pictures"><div class="blank">{words}</div></div>'
    if stage.output is not None:
        return draw_output(stage.output)
    percent = round(100 * stage.share)
    images = "".join(draw_image(x, "in progress") for x in stage.images)
    return (
        f'<div class="pictures {_layout(stage.images)}" data-share="{percent}">{images}'
        f'</div><div class="bar"><div style="width:{percent}%"></div></div>'
        + draw_note(f"generating, {percent}%")
    )


def draw_output(output: GenerationOutput) -> str:
    """Generated images, best first, with a warning about near copies of documents."""
    figures = []
    for image, document, score in zip(
        output.images, output.documents, output.scores, strict=True
    ):
        nearest = document.metadata.get("nearest")
        words = f"seed {output.seed} · sample {document.metadata['sample']} · "
        words += f"score {score:.3f}"
        if nearest:
            equal = f"{nearest['equal_codes']:.0%} of the codes equal those of"
            words += f" · {equal} {nearest['id']}"
        warning = ""
        if nearest and document.metadata.get("near_copy"):
            warning = f"Nearly a copy of {nearest['id']}."
        figures.append(
            f"<figure>{draw_image(image, output.prompt or 'generated')}<figcaption>"
            f"{draw_note(words)}{draw_note(warning, 'warning')}</figcaption></figure>"
        )
    note = draw_note(output.note, "warning") if output.note else ""
    return (
        f'{note}<div class="pictures done {_layout(figures)}" data-share="100">'
        + "".join(figures)
        + "</div>"
    )


def draw_contributions(names: Sequence[str], bits: Sequence[float]) -> str:
    """The contribution of each document to the best sample: a bar and its bits."""
    if not bits:
        return ""
    widest = max(1.0, *(abs(x) for x in bits))
    bars = "".join(
        f'<div class="line"><span class="label">{_text(name)}</span>'
        f'<div class="bar"><div style="width:{100 * max(0.0, x) / widest:.1f}%"></div>'
        f"</div><span>{round(x):+d} bits</span></div>"
        for name, x in zip(names, bits, strict=True)
    )
    words = "how much more likely each document makes this, given the other documents"
    return f'<div class="labels contributions">{draw_note(words)}{bars}</div>'


def _layout(images: Sequence[object]) -> str:
    return "one" if len(images) == 1 else "many"


def draw_earlier(earlier: Sequence[Earlier]) -> str:
    """Earlier images, small."""
    if len(earlier) < 2:
        return ""
    figures = "".join(
        f"<figure>{draw_image(e.image, e.prompt)}<figcaption>"
        f"{draw_note(e.prompt)}{draw_note(f'seed {e.seed}')}"
        f"{draw_note(' '.join(e.ids) or 'no documents')}</figcaption></figure>"
        for e in earlier[1:]
    )
    return f'<h4>before</h4><div class="earlier">{figures}</div>'


def draw_captions(output: GenerationOutput) -> str:
    """Captions, most likely first."""
    lines = "".join(
        f'<div class="answer">{_text(text)}</div>'
        + draw_note(f"seed {output.seed} · mean log-likelihood {score:.3f}")
        for text, score in zip(output.texts, output.scores, strict=True)
    )
    return f'<div class="captions">{lines}</div>'


def draw_labels(found: Classification) -> str:
    """Labels with their probabilities, most probable first."""
    order = np.argsort(-found.probabilities, kind="stable")
    bars = "".join(
        f'<div class="line"><span class="label">{_text(found.labels[i])}</span>'
        f'<div class="bar"><div style="width:{100 * found.probabilities[i]:.1f}%"></div>'
        f"</div><span>{found.probabilities[i]:.1%}</span></div>"
        for i in order
    )
    return f'<div class="labels"><div class="answer">{_text(found.label)}</div>{bars}</div>'


def draw_examples(support: Sequence[tuple[Image, str]]) -> str:
    """Labelled images."""
    if not support:
        return draw_note("No examples yet: at least two labels are needed.")
    figures = "".join(
        f"<figure>{draw_image(image, label)}<figcaption>{_text(label)}</figcaption>"
        "</figure>"
        for image, label in support
    )
    return f'<div class="earlier examples">{figures}</div>'


def draw_picked(image: Image | None) -> str:
    """The chosen image of a tab."""
    if image is None:
        return '<div class="picked"><div class="blank">no image yet</div></div>'
    return f'<div class="picked">{draw_image(image, "the chosen image")}</div>'


def draw_brush(image: Image | None, side: int) -> str:
    """An image to paint on; one cell is one code of the image tokenizer."""
    if image is None:
        return draw_picked(None)
    sizes = "".join(f"<option>{n}</option>" for n in range(1, 1 + max(1, side // 2)))
    sizes = sizes.replace("<option>2", "<option selected>2")
    return (
        f'<div class="brush">{draw_image(image, "to paint on")}'
        f'<canvas width="{side}" height="{side}"></canvas></div>'
        f'<div class="line"><label class="faint">brush <select>{sizes}</select></label>'
        '<button class="small" data-clear="1">Clear</button></div>'
    )


def _text(words: str) -> str:
    return html.escape(words, quote=True)
