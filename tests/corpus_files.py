"""A corpus of JSONL files whose documents `memory_fakes` can tokenise and embed."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import signal
import sys

from memory_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax.documents.images import encode_png
from racm3_jax.memory.builder import CorpusConfig, build_memory


def line(number: int, **more) -> str:
    document = make_document(number)
    image = base64.b64encode(encode_png(document.images[0])).decode()
    content = {"id": document.id, "caption": document.text, "image_base64": image}
    return json.dumps({**content, "url": f"http://site{number % 4}/{number}", **more})


def write_corpus(folder: pathlib.Path, lines: list[list[str]]) -> str:
    """Writes one file (one shard) per list of lines. Returns the source."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(lines):
        (folder / f"{number:03d}.jsonl").write_text("".join(f"{x}\n" for x in part))
    return f"jsonl:{folder}/*.jsonl"


def forty(folder: pathlib.Path) -> str:
    """40 documents in 4 shards."""
    return write_corpus(
        folder, [[line(i) for i in range(s, s + 10)] for s in range(0, 40, 10)]
    )


def load_models() -> tuple[FakeTokenizer, FakeEmbedder]:
    """As a worker of another process calls it."""
    return FakeTokenizer(), FakeEmbedder()


class KillingEmbedder(FakeEmbedder):
    """Ends its process, as `kill -9` does, at its n-th call."""

    def __init__(self, calls: int):
        super().__init__()
        self.calls = calls

    def embed_documents(self, documents):
        self.calls -= 1
        if self.calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_documents(documents)


if __name__ == "__main__":
    build_memory(
        sys.argv[1],
        tokenizer=FakeTokenizer(),
        embedder=KillingEmbedder(int(sys.argv[3])),
        path=sys.argv[2],
        config=CorpusConfig(index="exact", num_query_variants=2),
    )
