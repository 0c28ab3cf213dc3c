"""The page: tabs of components, with the handler of each button."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from racm3_jax.demo import panels
from racm3_jax.demo.desk import Desk
from racm3_jax.demo.handlers import Handlers
from racm3_jax.demo.session import (
    MAX_DOCUMENTS,
    MAX_RESULTS,
    MAX_SAMPLES,
    MAX_UPLOAD_BYTES,
    Session,
)

HERE = Path(__file__).parent
# All decodes share one queue of one.
_DECODE: dict[str, Any] = {
    "concurrency_id": "decode",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
# Small steps: the page appears before they are finished.
_QUICK: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": 4,
    "api_visibility": "private",
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Components shared by the tabs."""

    handlers: Handlers
    desk: gr.State
    earlier: gr.State


def build_page(session: Session, notice: str = "") -> gr.Blocks:
    """The page of a session, with an optional `notice` on top."""
    title = "RA-CM3"
    # Uploads are read immediately; their files are deleted within the hour.
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(600, 1800)
    ) as page:
        memory = session.memory
        held = "no memory" if memory is None else f"{memory.num_allowed:,} documents"
        gr.Markdown(
            f"# {title}\nOne model reads documents retrieved from a memory "
            f"({held}), and generates, captions, infills and classifies."
        )
        if notice:
            gr.HTML(panels.draw_note(notice, "warning"), elem_id="notice")
        parts = Parts(Handlers(session), gr.State(Desk()), gr.State(()))
        with gr.Tab("Draw"):
            _draw_tab(parts, session.example_prompts())
        with gr.Tab("Caption"):
            _caption_tab(parts)
        with gr.Tab("Infill and edit"):
            _infill_tab(parts)
        with gr.Tab("k-shot"):
            _classify_tab(parts)
        with gr.Tab("Memory"):
            _memory_tab(parts)
        script = (HERE / "uploads.js").read_text(encoding="utf-8")
        guard = gr.HTML("", js_on_load=script, max_bytes=MAX_UPLOAD_BYTES)
        guard.input(parts.handlers.refuse_upload, None, None, **_QUICK)
    page.queue(max_size=32, api_open=False)
    return page


def _draw_tab(parts: Parts, prompts: list[str]) -> None:
    do, desk = parts.handlers, parts.desk
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            show_label=False,
            placeholder="the flag of Ginelia on the moon",
            max_lines=2,
            scale=5,
            elem_id="prompt",
            container=False,
        )
        search = gr.Button("Find documents", scale=1, min_width=130, elem_id="search")
        draw = gr.Button(
            "Draw", variant="primary", scale=1, min_width=100, elem_id="draw"
        )
    tried = _panel(panels.draw_prompts(prompts), "prompts", visible=bool(prompts))
    with gr.Row():
        with gr.Column(scale=3):
            gr.Markdown("### Documents in the context")
            cards = _panel(panels.draw_desk(Desk()), "documents")
            with gr.Accordion("Add your own document", open=False, elem_id="own_box"):
                image, picked = _picture(parts, "own", with_last=False)
                caption = gr.Textbox(label="its caption", elem_id="own_caption")
                add = gr.Button("Add", size="sm", elem_id="own_add")
            with gr.Accordion("Settings", open=False):
                num_documents = _documents_slider()
                settings = _settings(do.session)
            before = _panel("", "earlier")
        with gr.Column(scale=2):
            gr.Markdown("### Image")
            picture = _panel(panels.draw_stage(None), "picture")
            contributions = _panel("", "contributions")
            with gr.Row():
                seed = settings[1].render()
                new_seed = gr.Button("New seed", size="sm", elem_id="new_seed")

    inputs = [desk, prompt, num_documents]
    search.click(do.search, inputs, [desk, cards], **_QUICK)
    prompt.submit(do.search, inputs, [desk, cards], **_QUICK)
    cards.click(do.change_desk, desk, [desk, cards], **_QUICK)
    add.click(
        do.add_own,
        [desk, image, caption],
        [desk, cards, image, picked, caption],
        **_QUICK,
    )
    tried.click(do.try_prompt, None, prompt, **_QUICK).then(
        do.search, inputs, [desk, cards], **_QUICK
    )
    new_seed.click(do.new_seed, None, seed, **_QUICK)
    draw.click(
        do.draw,
        [desk, parts.earlier, prompt, num_documents, *settings],
        [desk, cards, contributions, parts.earlier, picture, before],
        show_progress="hidden",
        **_DECODE,
    ).then(
        do.attribute, parts.earlier, contributions, show_progress="hidden", **_DECODE
    )


def _caption_tab(parts: Parts) -> None:
    do = parts.handlers
    with gr.Row():
        with gr.Column(scale=2):
            image, _ = _picture(parts, "caption")
        with gr.Column(scale=3):
            with gr.Row():
                num_documents = _documents_slider()
                num_samples = _samples_slider()
            with gr.Row():
                seed = _seed()
                temperature = _temperature(0.0)
            ask = gr.Button("Caption", variant="primary", elem_id="caption_go")
            answer = _panel("", "captions")
            gr.Markdown("### Documents used")
            cards = _panel(panels.draw_note("none yet"), "caption_documents")
    ask.click(
        do.caption,
        [image, num_documents, num_samples, seed, temperature],
        [answer, cards],
        show_progress_on=answer,
        **_DECODE,
    )


def _infill_tab(parts: Parts) -> None:
    do = parts.handlers
    with gr.Row():
        with gr.Column(scale=2):
            gr.Markdown("Paint over the region to regenerate.")
            cells = gr.State("")
            image, brush = _picture(parts, "infill", cells=cells)
            brush.input(do.keep_cells, None, cells, queue=False, **_QUICK)
        with gr.Column(scale=3):
            prompt = gr.Textbox(label="caption of the image", elem_id="infill_prompt")
            follows = gr.Radio(
                [
                    ("retrieved documents (infill)", False),
                    ("the documents on the Draw tab (edit)", True),
                ],
                value=False,
                label="guided by",
            )
            with gr.Accordion("Settings", open=False):
                num_documents = _documents_slider()
                settings = _settings(do.session)
                settings[1].render()
            ask = gr.Button("Regenerate", variant="primary", elem_id="infill_go")
            picture = _panel(panels.draw_stage(None), "infilled")
            gr.Markdown("### Documents used")
            cards = _panel(panels.draw_note("none yet"), "infill_documents")
    ask.click(
        do.infill,
        [parts.desk, image, cells, prompt, follows, num_documents, *settings],
        [picture, cards],
        show_progress="hidden",
        **_DECODE,
    )


def _classify_tab(parts: Parts) -> None:
    do, support = parts.handlers, gr.State([])
    gr.Markdown(
        "Few-shot classification by examples; labels may be meaningless. The "
        "shipped model is at chance in this task: it only shows the interface."
    )
    with gr.Row():
        with gr.Column():
            gr.Markdown("### Examples")
            image, picked = _picture(parts, "example")
            label = gr.Textbox(label="its label", elem_id="example_label")
            with gr.Row():
                add = gr.Button("Add example", size="sm", elem_id="example_add")
                clear = gr.Button("Clear", size="sm")
            examples = _panel(panels.draw_examples([]), "examples")
        with gr.Column():
            gr.Markdown("### Which label has this one?")
            inputs, _ = _picture(parts, "classify")
            ask = gr.Button("Classify", variant="primary", elem_id="classify_go")
            answer = _panel("", "labels")
    outputs = [support, examples, image, picked, label]
    add.click(do.add_example, [support, image, label], outputs, **_QUICK)
    clear.click(do.clear_examples, None, [support, examples], **_QUICK)
    ask.click(
        do.classify, [inputs, support], answer, show_progress_on=answer, **_DECODE
    )


def _memory_tab(parts: Parts) -> None:
    do, last, pending = parts.handlers, gr.State(""), gr.State("")
    with gr.Row(equal_height=True):
        query = gr.Textbox(
            show_label=False,
            placeholder="a flag on the beach",
            scale=5,
            elem_id="memory_query",
            container=False,
        )
        search = gr.Button(
            "Search", variant="primary", scale=1, elem_id="memory_search"
        )
    with gr.Accordion("Search by an image", open=False):
        image, _ = _picture(parts, "memory")
        by_image = gr.Button("Search by this image", size="sm")
    num_results = gr.Slider(
        1, MAX_RESULTS, value=6, step=1, label="results", elem_id="memory_results"
    )
    said = _panel("", "memory_said")
    with gr.Column(visible=False, elem_id="remove_question") as question:
        words = _panel("", "remove_words")
        with gr.Row():
            yes = gr.Button("Remove it", variant="stop", elem_id="remove_yes")
            no = gr.Button("Keep it", elem_id="remove_no")
    results = _panel("", "memory_found")

    inputs = [query, num_results]
    search.click(do.find_text, inputs, [results, last], **_QUICK)
    query.submit(do.find_text, inputs, [results, last], **_QUICK)
    by_image.click(do.find_image, [image, num_results], [results, last], **_QUICK)
    results.click(do.ask_removal, None, [pending, words, question], **_QUICK)
    no.click(do.keep, None, question, **_QUICK)
    yes.click(
        do.remove, [pending, last, num_results], [results, said, question], **_QUICK
    )


def _panel(value: str, name: str, visible: bool = True) -> gr.HTML:
    """HTML with buttons that trigger `click` with an action."""
    script = (HERE / "buttons.js").read_text(encoding="utf-8")
    return gr.HTML(
        value,
        js_on_load=script,
        elem_id=name,
        visible=visible,
        apply_default_css=False,
    )


def _picture(
    parts: Parts, name: str, *, cells: gr.State | None = None, with_last: bool = True
) -> tuple[gr.State, gr.HTML]:
    """An image picker: its state, and its view (a brush with `cells`)."""
    do, image = parts.handlers, gr.State(None)
    upload, take_last = do.upload, do.take_last
    shown = panels.draw_picked(None)
    if cells is None:
        panel = gr.HTML(shown, elem_id=f"{name}_picture", apply_default_css=False)
        outputs = [image, panel]
    else:
        script = (HERE / "brush.js").read_text(encoding="utf-8")
        panel = gr.HTML(
            shown, js_on_load=script, elem_id=f"{name}_brush", apply_default_css=False
        )
        outputs = [image, panel, cells]
        upload, take_last = do.upload_to_paint, do.take_last_to_paint
    with gr.Row():
        button = gr.UploadButton(
            "Upload an image",
            type="binary",
            file_types=["image"],
            size="sm",
            elem_id=f"{name}_upload",
        )
        button.upload(upload, button, outputs, **_QUICK)
        if with_last:
            last = gr.Button("Use the last image", size="sm", elem_id=f"{name}_last")
            last.click(take_last, parts.earlier, outputs, **_QUICK)
    return image, panel


def _settings(session: Session) -> list[Any]:
    """Sliders in the order of `handlers.name_settings`; the caller adds the seed."""
    measured = session.generator.defaults.get("image", {})
    num_samples = _samples_slider()
    seed = _seed(render=False)
    with gr.Row():
        temperature = _temperature(measured.get("temperature", 0.5))
        guidance = gr.Slider(0, 6, value=2, step=0.5, label="guidance (1: off)")
    guide_documents = gr.Checkbox(
        True, label="guidance also against generation without documents"
    )
    return [num_samples, seed, temperature, guidance, guide_documents]


def _documents_slider() -> gr.Slider:
    return gr.Slider(0, MAX_DOCUMENTS, value=2, step=1, label="documents")


def _samples_slider() -> gr.Slider:
    return gr.Slider(1, MAX_SAMPLES, value=1, step=1, label="samples")


def _temperature(value: float) -> gr.Slider:
    return gr.Slider(0, 1.5, value=value, step=0.05, label="temperature (0 is greedy)")


def _seed(render: bool = True) -> gr.Number:
    return gr.Number(0, label="seed", precision=0, minimum=0, render=render)
