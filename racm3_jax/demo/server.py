"""Serves the page on this machine only, and lets it load nothing from elsewhere."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# Gradio compiles its templates in the page, hence eval.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; object-src 'none'"
)


class ContentPolicy:
    """ASGI middleware: adds the policy to every answer."""

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


def prepare_environment() -> None:
    """No telemetry, and uploads in a folder of this process; before gradio's import."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    folder = tempfile.mkdtemp(prefix="racm3_demo_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder


def find_port(port: int) -> int:
    """The port itself if it is free; any free one for 0.

    Raises:
      ValueError: it is taken, or no port.
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


def serve(page: Any, port: int, max_upload_bytes: int) -> None:
    """Answers until Ctrl-C; prints the address."""
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
                # Other names for this machine could come from any web site.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(ContentPolicy),
            ]
        },
    )
    print(f"the demo is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
