"""Event handlers of the page: gradio values in, panels out; `Session` does the work."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from racm3_jax.demo import panels
from racm3_jax.demo.desk import Desk, Earlier, Given, remember
from racm3_jax.demo.session import (
    MAX_EXAMPLES,
    Session,
    check_size,
    check_text,
)
from racm3_jax.types import GenerationOutput

_EXPECTED = (ValueError, FileNotFoundError)


def explained(method: Callable) -> Callable:
    """Shows errors on the page in one sentence; logs unexpected ones, too."""

    def explain(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if not isinstance(error, _EXPECTED):
            logging.getLogger("racm3").exception("the demo failed", exc_info=error)
            sentence = f"this failed, see the terminal for details: {error!r}"
        else:
            sentence = str(error)
        # Gradio shows it as HTML, and it may quote user input.
        words = html.escape(sentence, quote=False)
        return gr.Error(words, duration=12, print_exception=False)

    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def follow(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from method(*args, **kwargs)
            except Exception as error:
                raise explain(error) from error

        return follow

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raise explain(error) from error

    return call


class Handlers:
    """One method per button; `session` does the work."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # Draw

    @explained
    def search(self, desk: Desk, prompt: str, num_documents: float) -> tuple:
        desk = self.session.search(desk, prompt, int(num_documents))
        return desk, panels.draw_desk(desk)

    @explained
    def change_desk(self, desk: Desk, event: gr.EventData) -> tuple:
        action, id = event.action, event.about
        if action == "pin":
            desk = self.session.pin(desk, id)
        elif action == "drop":
            desk = self.session.drop(desk, id)
        elif action == "restore":
            desk = self.session.restore(desk)
        return desk, panels.draw_desk(desk)

    @explained
    def add_own(self, desk: Desk, image: np.ndarray | None, caption: str) -> tuple:
        desk = self.session.add_own(desk, image, caption)
        return desk, panels.draw_desk(desk), None, panels.draw_picked(None), ""

    @explained
    def draw(
        self, desk: Desk, earlier: tuple, prompt: str, num: float, *settings: Any
    ) -> Any:
        shown = None
        options = name_settings(*settings)
        for stage in self.session.draw(desk, prompt, int(num), **options):
            # Only once, to keep documents dropped or pinned meanwhile.
            changed = (gr.skip(), gr.skip(), gr.skip())
            if shown is None:
                changed = (stage.desk, panels.draw_desk(stage.desk), "")
            shown = stage
            earlier = remember(earlier, stage)
            pictures = panels.draw_stage(stage), panels.draw_earlier(earlier)
            yield (*changed, earlier, *pictures)

    @explained
    def attribute(self, earlier: tuple[Earlier, ...]) -> str:
        """The contributions of documents to the last image, by one more pass."""
        if not earlier:
            return ""
        return self._contributions(earlier[0].output)

    def _contributions(self, output: GenerationOutput) -> str:
        names = [document.id for document in output.retrieved.documents]
        return panels.draw_contributions(names, self.session.attribute(output))

    def try_prompt(self, event: gr.EventData) -> str:
        return event.about

    def new_seed(self) -> int:
        return int(np.random.default_rng().integers(2**31))

    # Images for the other tabs

    @explained
    def refuse_upload(self, event: gr.EventData) -> None:
        check_size(event.name, event.bytes)
        raise ValueError(f"{event.name} is not an image: upload a PNG, JPEG or WEBP")

    @explained
    def upload(self, content: bytes | None) -> tuple:
        image = None if content is None else self.session.read_upload(content)
        return image, panels.draw_picked(image)

    @explained
    def take_last(self, earlier: tuple) -> tuple:
        image = last_image(earlier)
        return image, panels.draw_picked(image)

    @explained
    def upload_to_paint(self, content: bytes | None) -> tuple:
        image = None if content is None else self.session.read_upload(content)
        return image, panels.draw_brush(image, self.session.side), ""

    @explained
    def take_last_to_paint(self, earlier: tuple) -> tuple:
        image = last_image(earlier)
        return image, panels.draw_brush(image, self.session.side), ""

    # Caption

    @explained
    def caption(
        self,
        image: np.ndarray | None,
        num_documents: float,
        num_samples: float,
        seed: float | None,
        temperature: float,
    ) -> tuple:
        output, given = self.session.caption(
            image,
            int(num_documents),
            num_samples=num_samples,
            seed=seed,
            temperature=temperature,
        )
        answer = panels.draw_captions(output) + self._contributions(output)
        return answer, draw_read(given)

    # Infill and edit

    def keep_cells(self, event: gr.EventData) -> str:
        return event.cells

    @explained
    def infill(
        self,
        desk: Desk,
        image: np.ndarray | None,
        cells: str,
        prompt: str,
        follows: bool,
        num_documents: float,
        *settings: Any,
    ) -> Any:
        painted = np.zeros(self.session.side**2, bool)
        if len(cells) == len(painted):
            painted = np.array([cell == "1" for cell in cells])
        given = desk.given if follows else None
        inputs = (image, painted, prompt or "", int(num_documents), given)
        for stage in self.session.infill(*inputs, **name_settings(*settings)):
            read = gr.skip() if stage.output is None else draw_read(stage.desk.given)
            yield panels.draw_stage(stage), read

    # k-shot

    @explained
    def add_example(self, support: list, image: np.ndarray | None, label: str) -> tuple:
        if image is None:
            raise ValueError("choose an image for the example first")
        if len(support) >= MAX_EXAMPLES:
            raise ValueError(f"at most {MAX_EXAMPLES} examples are allowed")
        support = [*support, (image, check_text(label, "the label", "dax"))]
        examples = panels.draw_examples(support)
        return support, examples, None, panels.draw_picked(None), ""

    def clear_examples(self) -> tuple:
        return [], panels.draw_examples([])

    @explained
    def classify(self, image: np.ndarray | None, support: list) -> str:
        return panels.draw_labels(self.session.classify(image, support))

    # Memory

    @explained
    def find_text(self, query: str, num_results: float) -> tuple:
        found = self.session.find(query, int(num_results))
        return render_results(found), query

    @explained
    def find_image(self, image: np.ndarray | None, num_results: float) -> tuple:
        if image is None:
            raise ValueError("upload an image to search by first")
        return render_results(self.session.find(image, int(num_results))), image

    @explained
    def ask_removal(self, event: gr.EventData) -> tuple:
        words = (
            f"Remove {event.about} from the memory permanently? It is removed "
            "for all users of this memory, and cannot be restored here."
        )
        return event.about, panels.draw_note(words, "words"), gr.Column(visible=True)

    @explained
    def remove(self, id: str, query: Any, num_results: float) -> tuple:
        said = self.session.remove(id)
        found = self.session.find(query, int(num_results))
        return render_results(found), panels.draw_note(said), gr.Column(visible=False)

    def keep(self) -> gr.Column:
        return gr.Column(visible=False)


def name_settings(
    num_samples: float,
    seed: float | None,
    temperature: float,
    guidance: float,
    guide_documents: bool,
) -> dict[str, Any]:
    """The sliders, in page order, as keyword arguments of the generator."""
    return {
        "num_samples": num_samples,
        "seed": seed,
        "temperature": temperature,
        "guidance": guidance,
        "guide_documents": guide_documents,
    }


def last_image(earlier: tuple[Earlier, ...]) -> np.ndarray:
    """The last image of the first tab."""
    if not earlier:
        raise ValueError("nothing is generated yet: use the Draw tab first")
    return earlier[0].image


def draw_read(given: tuple[Given, ...]) -> str:
    """The documents in the context of an answer."""
    return panels.draw_cards(given) if given else panels.draw_note("no documents")


def render_results(found: tuple[Given, ...]) -> str:
    """The results of a search in the memory."""
    if not found:
        return panels.draw_note("Nothing was found.")
    return panels.draw_cards(found, ("remove",))
