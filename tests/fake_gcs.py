"""Google's object store on 127.0.0.1, as far as gcsfs uses it; in memory.

    GET  /storage/v1/b/me/o?prefix=run/&delimiter=/      a listing
    GET  /storage/v1/b/me/o/run%2Fa                      facts of an object
    GET  /download/storage/v1/b/me/o/run%2Fa?alt=media   its bytes, or a range of them
    POST /upload/storage/v1/b/me/o?uploadType=multipart  a small object
    POST /upload/storage/v1/b/me/o?uploadType=resumable  a large one, then /resume/0

There is one bucket, `me`; `closed` is forbidden.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

_PLACE = re.compile(r"/(?:upload/|download/)?storage/v1/b/([^/]+)(/o)?(?:/(.+))?")
_TIME = "2026-01-01T00:00:00.000Z"


class Server(http.server.ThreadingHTTPServer):
    """Answers until `shutdown`; its objects are `{name: (content, generation)}`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: list[tuple[str, bytearray]] = []
        self.generations = itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def keep(self, name: str, content: bytes) -> dict[str, str]:
        self.objects[name] = content, next(self.generations)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, str]:
        content, generation = self.objects[name]
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        return {
            "name": name,
            "bucket": "me",
            "size": str(len(content)),
            "generation": str(generation),
            "md5Hash": base64.b64encode(digest).decode(),
            "updated": _TIME,
            "timeCreated": _TIME,
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # gcsfs may not read the whole answer
            self.close_connection = True

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, words: str) -> None:
        self.answer(status, {"error": {"code": status, "message": words}})

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts.path.startswith("/resume/"):
            return self.resume(int(parts.path.rpartition("/")[2]), body)
        found = _PLACE.fullmatch(parts.path)
        if not found or found[1] not in ("me", "closed"):
            return self.refuse(404, "The specified bucket does not exist.")
        if found[1] == "closed":
            return self.refuse(403, "you do not have storage.objects.list access")
        if parts.path.startswith("/upload/"):
            return self.upload(query, body)
        if not found[2]:
            return self.answer(200, {"name": "me", "locationType": "region"})
        if not found[3]:
            return self.list(query.get("prefix", ""), query.get("delimiter"))
        return self.give(urllib.parse.unquote(found[3]), "alt" in query)

    do_POST = do_PUT = do_DELETE = do_GET

    def list(self, prefix: str, delimiter: str | None) -> None:
        items, folders = [], set()
        for name in sorted(self.server.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.server.describe(name))
        self.answer(200, {"items": items, "prefixes": sorted(folders)})

    def upload(self, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            self.server.uploads.append((name, bytearray()))
            place = f"{self.server.url}/resume/{len(self.server.uploads) - 1}"
            return self.answer(200, Location=place)
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
        _, facts, content, _ = body.split(b"--" + boundary.encode())
        name = json.loads(facts.partition(b"\n\n")[2])["name"]
        content = content.partition(b"\n\n")[2].removesuffix(b"\n")
        return self.answer(200, self.server.keep(name, content))

    def resume(self, number: int, body: bytes) -> None:
        name, content = self.server.uploads[number]
        content += body
        if len(content) < int(self.headers["Content-Range"].rpartition("/")[2]):
            return self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        return self.answer(200, self.server.keep(name, bytes(content)))

    def give(self, name: str, wants_content: bool) -> None:
        if name not in self.server.objects:
            return self.refuse(404, f"No such object: me/{name}")
        if self.command == "DELETE":
            del self.server.objects[name]
            return self.answer(204)
        content, wanted = self.server.objects[name][0], self.headers.get("Range")
        if not wants_content:
            return self.answer(200, self.server.describe(name))
        if not wanted:
            return self.answer(200, content)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        return self.answer(206, part) if part else self.refuse(416, "no such range")
