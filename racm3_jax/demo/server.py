"""Serves the page on this machine only, without external resources."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from racm3_jax.demo.uploads import UploadFolder, UploadLimit, refuse

HOST = "127.0.0.1"
# Gradio compiles its templates in the page, which needs eval.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; object-src 'none'"
)


class ContentPolicy:
    """ASGI middleware: adds the policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                headers.append((b"content-security-policy", _POLICY.encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


class SameOrigin:
    """ASGI middleware: answers only requests of the demo's own page.

    Any web site can make a visitor's browser send a form or a file here; the browser's
    headers (Origin, Sec-Fetch-Site) identify the sender. The page itself may be opened
    from anywhere.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not is_own_page(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            words = "this request comes from another web site: open the demo itself"
            await refuse(send, 403, words)
            return
        await self.app(scope, receive, send)


def is_own_page(scope: Any) -> bool:
    """Whether a request was sent by the page, or opens the page."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    site = headers.get(b"sec-fetch-site")
    if origin not in (None, b"http://" + headers.get(b"host", b"")):
        return False
    if scope.get("method") in ("GET", "HEAD"):
        return scope["path"] == "/" or site in (None, b"none", b"same-origin")
    return origin is not None and site in (None, b"same-origin")


def prepare_environment(folder: Path) -> None:
    """Turns telemetry off and sets the folder of files; before importing gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def find_port(port: int) -> int:
    """The port if it is free; for 0, any free one.

    Raises:
      ValueError: the port is in use or invalid.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; give 1 to 65535, or 0 for any free port")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used ({error.strerror}): give another --port, or "
                "0 for any free one"
            ) from None
        return probe.getsockname()[1]


def serve(page: Any, port: int, max_upload_bytes: int, uploads: UploadFolder) -> None:
    """Prints the address and serves until Ctrl-C."""
    from gradio.themes import Default  # pyright: ignore[reportMissingImports]
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]
    from starlette.middleware.trustedhost import (  # pyright: ignore[reportMissingImports]
        TrustedHostMiddleware,
    )

    fonts = ["system-ui", "sans-serif"]
    _, url, _ = page.launch(
        server_name=HOST,
        server_port=find_port(port),
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size=max_upload_bytes,
        state_session_capacity=64,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=Default(
            primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=[Path(__file__).parent / "style.css"],
        app_kwargs={
            "middleware": [
                # Other host names could come from any web site.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(ContentPolicy),
                Middleware(SameOrigin),
                Middleware(UploadLimit, uploads=uploads),
            ]
        },
    )
    print(f"the demo is at {url} (Ctrl-C to stop)", flush=True)
    page.block_thread()
