"""The demo in a headless Chromium (`pytest -n 0 -m browser`).

RACM3_DEMO_WORKDIR names a finished `racm3 quickstart --short` to use; without it one is
made. RACM3_DEMO_SCREENSHOTS names a folder for screenshots of every step. The tests are one
visit, in order, over a copy of the memory.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from racm3_jax.documents.images import encode_png

pytestmark = pytest.mark.browser
PATIENCE_SECONDS = 60
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1400",
    "--force-device-scale-factor=1",
)


def command(*arguments):
    return [sys.executable, "-m", "racm3_jax.cli", *arguments]


def plain_environment():
    """Without what conftest sets for small compilations."""
    own = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in own}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    given = os.environ.get("RACM3_DEMO_WORKDIR")
    made = tmp_path_factory.mktemp("quickstart") / "out"
    if given is None:
        arguments = ["quickstart", "--short", f"--workdir={made}"]
        subprocess.run(command(*arguments), check=True, env=plain_environment())
        return made
    # Removal changes the memory.
    shutil.copytree(given, made, ignore=shutil.ignore_patterns("checkpoints"))
    return made


@pytest.fixture(scope="module")
def address(workdir):
    """Of a running demo."""
    with subprocess.Popen(
        command("demo", f"--workdir={workdir}", "--port=0"),
        stdout=subprocess.PIPE,
        text=True,
        env=plain_environment(),
    ) as process:
        assert process.stdout is not None
        try:
            words = ""
            for line in process.stdout:
                words += line
                if "the demo is at http" in line:
                    break
            else:
                pytest.fail(f"the demo did not start: {words}")
            yield words.split("the demo is at ")[1].split()[0]
        finally:
            process.terminate()
            process.wait(20)


class Visitor:
    """A user who clicks, types and waits."""

    def __init__(self, driver, screenshots):
        self.driver = driver
        self.screenshots = screenshots

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def wait(self, found, what):
        """Until `found()` is true, and returns it; stale elements count as not yet."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            try:
                if result := found():
                    return result
            except WebDriverException:
                pass
            time.sleep(0.05)
        self.screenshot("failed")
        raise AssertionError(f"waited {PATIENCE_SECONDS} s for {what}")

    def one(self, css):
        def shown():
            return next((e for e in self.all(css) if e.is_displayed()), None)

        return self.wait(shown, css)

    def click(self, css):
        def clicked():
            element = self.one(css)
            self.driver.execute_script(
                "arguments[0].scrollIntoView({block: 'center'})", element
            )
            element.click()
            return True

        self.wait(clicked, f"a click on {css}")

    def type(self, css, text):
        box = self.one(f"{css} textarea, {css} input")
        box.clear()
        box.send_keys(text)

    def open_tab(self, name):
        def chosen():
            for tab in self.all("button[role=tab]"):
                if tab.text == name:
                    tab.click()
                    return True
            return False

        self.wait(chosen, f"the tab {name}")

    def texts(self, css):
        return [element.text for element in self.all(css)]

    def toasts(self):
        return self.texts("[data-testid=toast-body]")

    def ids(self, panel="#documents"):
        return [
            card.get_attribute("data-document") for card in self.all(f"{panel} .card")
        ]

    def drop_while(self, word):
        """Drops the documents whose card has this word; others replace them."""

        def next_id():
            cards = [card for card in self.all("#documents .card") if word in card.text]
            return [cards[0].get_attribute("data-document") if cards else None]

        while id := self.wait(next_id, "the documents")[0]:
            self.click(f"#documents .card[data-document='{id}'] [data-action=drop]")
            self.wait(lambda gone=id: gone not in self.ids(), f"{id} to go")

    def generated_image(self):
        """The finished image, as a data URL."""
        return self.one("#picture .done img").get_attribute("src")

    def saw_progress(self):
        """Whether `WATCH` has seen an unfinished image."""
        shares = self.driver.execute_script("return [...window.shares]")
        return any(0 < share < 100 for share in shares)

    def upload(self, name, path):
        place = f"//*[@id='{name}']/preceding-sibling::input[@type='file'][1]"

        def sent():  # the contents of an accordion are created when it opens
            self.driver.find_element("xpath", place).send_keys(str(path))
            return True

        self.wait(sent, f"the input of {name}")

    def screenshot(self, name):
        if self.screenshots:
            self.driver.execute_script("window.scrollTo(0, 0)")
            self.driver.save_screenshot(str(self.screenshots / f"{name}.png"))


@pytest.fixture(scope="module")
def visitor(address, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    folder = os.environ.get("RACM3_DEMO_SCREENSHOTS")
    screenshots = pathlib.Path(folder) if folder else None
    if screenshots:
        screenshots.mkdir(parents=True, exist_ok=True)
    driver = webdriver.Chrome(options, service)
    try:
        driver.get(address)
        visitor = Visitor(driver, screenshots)
        visitor.one("#prompt textarea")
        yield visitor
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def prompt(workdir):
    """Of a nation that the memory shows several times."""
    from racm3_jax.memory.memory import Memory

    with Memory.load(workdir / "memory") as memory:
        (document,) = memory.documents(np.array([0]))
    return f"the flag of {document.metadata['nation']} on the moon"


WATCH = """
const panel = document.querySelector(arguments[0]);
window.shares = new Set();
new MutationObserver(() => {
  const progress = panel.querySelector('[data-share]');
  if (progress) window.shares.add(Number(progress.dataset.share));
}).observe(panel, {attributes: true, childList: true, subtree: true});
"""


def test_generate_drop_and_generate_again(visitor, prompt):
    visitor.screenshot("0_start")
    visitor.type("#prompt", prompt)
    visitor.click("#search")
    visitor.wait(lambda: len(visitor.ids()) == 2, "two documents")
    first_ids = visitor.ids()
    words = visitor.one("#documents").text
    assert "score 0." in words and all(id in words for id in first_ids)
    visitor.screenshot("1_found")

    visitor.driver.execute_script(WATCH, "#picture")
    visitor.click("#draw")
    first = visitor.generated_image()
    assert visitor.saw_progress()
    assert "seed 0" in visitor.one("#picture figcaption").text
    assert visitor.ids() == first_ids
    listed = visitor.wait(lambda: visitor.one("#contributions").text, "contributions")
    assert "bits" in listed and all(id in listed for id in first_ids)
    visitor.screenshot("2_generated")

    # Nothing has changed: the same image again.
    visitor.click("#draw")
    visitor.wait(
        lambda: len(visitor.all("#earlier figure")) == 1, "one earlier drawing"
    )
    assert visitor.generated_image() == first

    # All of its documents show the flag, so dropping one may change nothing.
    nation = prompt.removeprefix("the flag of ").removesuffix(" on the moon")
    visitor.drop_while(nation)
    assert first_ids[0] in visitor.one("#documents .dropped").text
    assert not set(visitor.ids()) & set(first_ids)
    visitor.screenshot("3_documents_of_another_nation")
    visitor.click("#draw")
    visitor.wait(lambda: len(visitor.all("#earlier figure")) == 2, "two earlier ones")
    assert visitor.generated_image() != first
    visitor.screenshot("3_generated_without_the_first_documents")


def test_pin_and_add_a_document(visitor, tmp_path):
    kept = visitor.ids()[0]
    visitor.click("#documents [data-action=pin]")
    visitor.wait(lambda: visitor.all("#documents .card.stays"), "a pinned document")
    visitor.click("#own_box button")
    picture = tmp_path / "own.png"
    picture.write_bytes(encode_png(np.full((64, 64, 3), (200, 30, 30), np.uint8)))
    visitor.upload("own_upload", picture)
    visitor.one("#own_picture img")
    visitor.type("#own_caption", "a red square")
    visitor.click("#own_add")
    visitor.wait(lambda: visitor.ids() == ["own-1", kept], "the new document")
    visitor.screenshot("4_pinned_and_own")


def test_errors_are_shown_in_one_sentence(visitor, tmp_path):
    visitor.type("#prompt", " ")
    visitor.click("#draw")
    toast = visitor.one("[data-testid=toast-body]")
    assert "the prompt is empty: write something" in toast.text
    visitor.screenshot("5_mistake")
    visitor.open_tab("Caption")
    for name, content, sentence in (
        ("wrong.png", b"this is no picture", "the file is not an image"),
        ("large.png", bytes(9 << 20), "large.png has 9.0 MB; 8 MB are allowed"),
        ("notes.txt", b"no picture either", "notes.txt is not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        visitor.upload("caption_upload", tmp_path / name)
        visitor.wait(
            lambda said=sentence: any(said in toast for toast in visitor.toasts()),
            sentence,
        )
    visitor.screenshot("6_wrong_files")
    assert not visitor.all("#caption_picture img")


def test_caption(visitor):
    visitor.click("#caption_last")
    visitor.one("#caption_picture img")
    visitor.click("#caption_go")
    assert visitor.one("#captions .answer").text
    assert len(visitor.ids("#caption_documents")) == 2
    visitor.screenshot("7_caption")


def test_infill_with_a_brush(visitor, prompt):
    from selenium.webdriver.common.action_chains import ActionChains

    visitor.open_tab("Infill and edit")
    visitor.click("#infill_go")
    visitor.wait(
        lambda: any("choose an image" in t for t in visitor.toasts()),
        "what is missing",
    )
    visitor.click("#infill_last")
    canvas = visitor.one("#infill_brush canvas")
    given = visitor.one("#infill_brush img").get_attribute("src")
    stroke = ActionChains(visitor.driver).move_to_element_with_offset(canvas, -100, -60)
    stroke.click_and_hold().move_by_offset(120, 0).move_by_offset(0, 90).release()
    stroke.perform()
    visitor.type("#infill_prompt", prompt)
    painted = visitor.driver.execute_script(
        "return arguments[0].cells.reduce((sum, cell) => sum + cell)", canvas
    )
    assert painted > 9  # a stroke, and not only where the pointer stopped
    visitor.screenshot("8_painted")
    visitor.driver.execute_script(WATCH, "#infilled")
    visitor.click("#infill_go")
    filled = visitor.one("#infilled .done img").get_attribute("src")
    assert filled != given and visitor.saw_progress()
    assert visitor.ids("#infill_documents")
    visitor.screenshot("9_infilled")


def test_labels_from_examples(visitor, tmp_path):
    visitor.open_tab("k-shot")
    for i, (label, colour) in enumerate([("dax", (200, 0, 0)), ("wug", (0, 0, 200))]):
        picture = tmp_path / f"{label}.png"
        picture.write_bytes(encode_png(np.full((64, 64, 3), colour, np.uint8)))
        visitor.upload("example_upload", picture)
        visitor.one("#example_picture img")
        visitor.type("#example_label", label)
        visitor.click("#example_add")
        visitor.wait(
            lambda n=i + 1: len(visitor.all("#examples figure")) == n, "the example"
        )
    visitor.click("#classify_last")
    visitor.one("#classify_picture img")
    visitor.click("#classify_go")
    assert visitor.one("#labels .answer").text in ("dax", "wug")
    visitor.screenshot("10_labels")


def test_a_removed_document_does_not_come_back(visitor, prompt):
    visitor.open_tab("Memory")
    visitor.type("#memory_query", prompt)
    visitor.click("#memory_search")
    panel = "#memory_found"
    visitor.wait(lambda: len(visitor.ids(panel)) == 6, "six results")
    first, *others = visitor.ids(panel)
    visitor.screenshot("11_memory")
    visitor.click(f"{panel} [data-action=remove]")
    assert first in visitor.one("#remove_question").text
    visitor.click("#remove_no")
    visitor.wait(
        lambda: not any(e.is_displayed() for e in visitor.all("#remove_question")),
        "the question to go",
    )
    assert visitor.ids(panel)[0] == first
    visitor.click(f"{panel} [data-action=remove]")
    visitor.one("#remove_question")
    visitor.screenshot("12_remove")
    visitor.click("#remove_yes")
    visitor.wait(
        lambda: f"Removed {first}" in visitor.one("#memory_said").text, "a word"
    )
    visitor.click("#memory_search")
    visitor.wait(lambda: visitor.ids(panel)[:5] == others, "the others")
    assert first not in visitor.ids(panel)
    visitor.screenshot("13_removed")
    visitor.open_tab("Draw")
    visitor.type("#prompt", prompt)
    visitor.click("#search")
    visitor.wait(lambda: visitor.ids(), "documents")
    assert first not in visitor.ids()


def test_nothing_was_loaded_from_elsewhere(visitor, address):
    """The page loads only from this machine, and logs no errors in the console."""
    requested = set()
    for entry in visitor.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requested.add(message["params"]["request"]["url"])
    foreign = {u for u in requested if not u.startswith((address, "data:", "blob:"))}
    assert not {u for u in foreign if u.startswith("http")}, foreign
    assert len(requested) > 5


def test_other_web_sites_cannot_upload(address):
    """Without a browser: the requests that one would send for another site."""

    def upload(origin):
        content = encode_png(np.zeros((8, 8, 3), np.uint8))
        start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"'
        body = (
            start + b"\r\nContent-Type: image/png\r\n\r\n" + content + b"\r\n--x--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Origin": origin}
        url = f"{address}gradio_api/upload"
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None

    assert upload("http://evil.example") == (403, None)
    status, (path,) = upload(address.rstrip("/"))
    assert status == 200 and pathlib.Path(path).is_file()
