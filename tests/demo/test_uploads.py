"""Uploads: one total size, no leftover files, and nothing from other web sites."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import stat
import tempfile

import numpy as np
import pytest

from racm3_jax.demo import server, uploads
from racm3_jax.demo.uploads import KeptPixels, UploadFolder, UploadLimit
from racm3_jax.documents.images import encode_png

HOST = "127.0.0.1:7860"
OWN = f"http://{HOST}"


class App:
    """Reads a whole request, as the page's server does, and answers 200."""

    def __init__(self):
        self.received = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.received.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})


def ask(app, method="POST", path="/gradio_api/upload", body=(b"",), **headers):
    """The status of the answer."""
    names = {"host": HOST} | {k.replace("_", "-"): v for k, v in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in names.items() if v],
    }
    messages = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(body)}
        for i, part in enumerate(body)
    ]
    answers = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    asyncio.run(app(scope, receive, send))
    assert [a["type"] for a in answers] == ["http.response.start", "http.response.body"]
    return answers[0]["status"]


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/x", "/"]
)
def test_only_the_page_itself_may_send_requests(path):
    inner = App()
    app = server.SameOrigin(inner)
    assert ask(app, path=path, origin=OWN, sec_fetch_site="same-origin") == 200
    assert ask(app, path=path, origin=OWN) == 200  # an older browser
    assert len(inner.received) == 2
    for origin in (
        "https://evil.example",
        "http://127.0.0.1:3000",
        "http://localhost:7860",
        f"https://{HOST}",
        f"{OWN}.evil.example",
        "null",
        None,
    ):
        assert ask(app, path=path, origin=origin) == 403
    for site in ("cross-site", "same-site", "none"):
        assert ask(app, path=path, origin=OWN, sec_fetch_site=site) == 403
    assert ask(app, "DELETE", path=path, origin="http://evil.example") == 403
    assert len(inner.received) == 2


def test_only_the_page_itself_may_be_opened_from_anywhere():
    app = server.SameOrigin(App())
    for site in ("cross-site", "same-site", "none", "same-origin", None):
        assert ask(app, "GET", "/", sec_fetch_site=site) == 200
    file = "/gradio_api/file=x.png"
    for site in ("same-origin", "none", None):
        assert ask(app, "GET", file, sec_fetch_site=site) == 200
    for site in ("cross-site", "same-site"):
        assert ask(app, "GET", file, sec_fetch_site=site) == 403
    assert ask(app, "GET", file, origin="http://evil.example") == 403


def test_foreign_websockets_are_closed():
    scope = {
        "type": "websocket",
        "path": "/x",
        "headers": [(b"host", HOST.encode()), (b"origin", b"http://evil.example")],
    }
    answers = []

    async def send(message):
        answers.append(message)

    async def app(scope, receive, send):
        raise AssertionError

    asyncio.run(server.SameOrigin(app)(scope, None, send))
    assert answers == [{"type": "websocket.close", "code": 1008}]


def test_all_uploads_share_one_limit(tmp_path):
    inner = App()
    folder = UploadFolder(tmp_path, max_bytes=100)
    app = UploadLimit(inner, folder)
    assert ask(app, body=[b"x" * 50, b"x" * 50]) == 200
    assert folder.arriving == 0
    assert ask(app, body=[b"x" * 50, b"x" * 51]) == 413
    assert ask(app, body=[b"x"], content_length="101") == 413
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"x" * 60)
    assert ask(app, body=[b"x" * 40]) == 200
    assert ask(app, body=[b"x" * 41]) == 413
    assert ask(app, "GET", "/", body=[b"x" * 41]) == 200
    assert len(inner.received) == 3 and folder.arriving == 0


def test_files_that_were_read_do_not_count(tmp_path):
    folder = UploadFolder(tmp_path, max_bytes=100)
    for name, age in (("old", 900), ("older", 1000), ("new", 0)):
        (tmp_path / name).write_bytes(b"x" * 30)
        written = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (written, written))
    assert folder.has_room(40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    assert not folder.has_room(71)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_pixels_count_as_long_as_they_are_referenced():
    kept = KeptPixels(max_pixels=100)
    images = [kept.keep(np.zeros((7, 7, 3), np.uint8)) for _ in range(2)]
    with pytest.raises(ValueError, match="too many images of its visitors"):
        kept.keep(np.zeros((7, 7, 3), np.uint8))
    images.pop()
    gc.collect()
    assert kept.keep(np.zeros((7, 7, 3), np.uint8)).shape == (7, 7, 3)


def test_a_session_counts_its_uploads(session):
    session._kept = KeptPixels(max_pixels=150)
    content = encode_png(np.zeros((10, 12, 3), np.uint8))
    image = session.read_upload(content)
    assert image.shape == (10, 10, 3)
    with pytest.raises(ValueError, match="too many images"):
        session.read_upload(content)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_folder_is_private_and_is_deleted_after_a_signal(temporary, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, uploads.private_folder() as folder:
        assert folder.parent == temporary
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "upload.png").write_bytes(b"x")
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert not list(temporary.iterdir()) and signal.getsignal(number) == before


def test_folders_of_killed_demos_are_deleted_and_others_are_not(temporary):
    killed = temporary / "racm3_demo_killed"
    killed.mkdir()
    (killed / "upload.png").write_bytes(b"x")
    os.utime(killed, (0, 0))
    (temporary / "racm3_demo_file").write_text("mine")
    (temporary / "mine").mkdir()
    with uploads.private_folder() as first, uploads.private_folder() as second:
        assert first != second and first.is_dir() and not killed.exists()
    names = sorted(path.name for path in temporary.iterdir())
    assert names == ["mine", "racm3_demo_file"]


def test_everything_that_the_server_writes_goes_into_the_folder(monkeypatch, tmp_path):
    for name in ("TMPDIR", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.setattr(tempfile, "tempdir", None)
    server.prepare_environment(tmp_path)
    assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == str(tmp_path)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
