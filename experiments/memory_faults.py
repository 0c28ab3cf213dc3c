"""Tries to break a memory: kills, corruption, removal, duplicates, RAM.

    python experiments/memory_faults.py --out=memory_faults --kills=50 --corruptions=35

Writes `results.json`. What is expected of every figure stands in `expected`; the exit
status is 1 if one is missed. Needs no trained models: documents are tokenised by bytes
and embedded by hashing their words, so that a run measures the memory alone. Tiny form:
--num_documents=400 --kills=2 --corruptions=7 --lists=400 --ram_documents=0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.retrieval import corpus_build, integrity, memory_edit
from racm3_jax.retrieval.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import Document, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

D_EMBED = 64
FILES = 8


class ByteTokenizer:
    """Bytes of the text; no images."""

    vocab = Vocab(num_text_ids=256, num_image_codes=8, image_length=4, num_sentinels=8)

    def fingerprint(self) -> str:
        return "bytes"

    def tokenize(self, documents):
        for document in documents:
            tokens = np.frombuffer(document.text.encode(), np.uint8).astype(np.int32)
            segments = (TokenizedSegment("text", tokens),)
            yield TokenizedDocument(
                document.id, segments, document.source, dict(document.metadata)
            )


class WordEmbedder:
    """The mean of one random direction a word."""

    d_embed = D_EMBED
    config = types.SimpleNamespace(image_size=8)

    def fingerprint(self) -> str:
        return "words"

    def embed_texts(self, texts, drop=0.0, rng=None):
        rows = []
        for text in texts:
            words = text.split()
            if rng is not None and len(words) > 1:
                words = [w for w in words if rng.random() >= drop] or words[:1]
            rows.append(sum(_direction(word) for word in words))
        rows = np.asarray(rows, np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def embed_images(self, images, drop=0.0, rng=None):
        raise NotImplementedError("these documents have no images")

    def embed_documents(self, documents: list[Document]):
        text = self.embed_texts([document.text for document in documents])
        return text, np.zeros_like(text), text


def _direction(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
    return np.random.default_rng(seed).normal(size=D_EMBED)


def write_corpus(folder: Path, num_documents: int, planted: float = 0.0) -> str:
    """JSONL files of documents of eight words each; returns the source.

    Args:
      folder: made.
      num_documents: in all.
      planted: share of them that copy another one's words, under another id.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    words = rng.integers(0, 2000, (num_documents, 8))
    copies = rng.random(num_documents) < planted
    for number in np.flatnonzero(copies):
        words[number] = words[rng.integers(num_documents)]
    for number, rows in enumerate(np.array_split(np.arange(num_documents), FILES)):
        lines = (
            json.dumps({"id": f"d{r}", "text": " ".join(f"w{w}" for w in words[r])})
            for r in rows
        )
        (folder / f"{number:03d}.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}/*.jsonl"


def build(source: str, path: Path, **settings: Any) -> None:
    config = corpus_build.CorpusConfig(num_query_variants=1, **settings)
    corpus_build.build_corpus(
        source,
        tokenizer=ByteTokenizer(),
        embedder=WordEmbedder(),
        path=path,
        config=config,
    )


def start_build(source: str, path: Path, **settings: Any) -> subprocess.Popen[bytes]:
    arguments = [json.dumps(settings), source, str(path)]
    return subprocess.Popen([sys.executable, __file__, "--child", *arguments])


def digests(path: Path) -> dict[str, str]:
    names = integrity.list_files(path)
    return {n: d["sha256"] for n, d in integrity.describe_files(path, names).items()}


def try_kills(source: str, out: Path, whole: Path, kills: int) -> dict[str, Any]:
    """Builds, each killed at a random moment and then run again to its end."""
    start = time.perf_counter()
    build(source, out / "timed")
    seconds = time.perf_counter() - start + 3  # a process starts in about three
    shutil.rmtree(out / "timed")
    rng, equal, struck = random.Random(0), 0, 0
    for _ in range(kills):
        path = out / "killed"
        child = start_build(source, path)
        try:
            child.wait(rng.uniform(0, 1.2 * seconds))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            struck += 1
        if not path.exists():
            build(source, path)
        left = [p.name for p in out.iterdir() if p.name.startswith(".killed")]
        equal += digests(path) == digests(whole) and not left
        shutil.rmtree(path)
        shutil.rmtree(corpus_build.work_directory(path), ignore_errors=True)
    return {"kills": kills, "struck_while_building": struck, "equal": equal}


def try_corruptions(memory: Path, out: Path, number: int) -> dict[str, Any]:
    """Bit flips, truncations and swapped files; each must be noticed on loading."""
    rng, silent = random.Random(1), []
    for i in range(number):
        path = out / "damaged"
        shutil.copytree(memory, path)
        names = integrity.list_files(path)
        name = rng.choice(names)
        data = bytearray((path / name).read_bytes())
        kind = ("flip", "truncate", "swap")[i % 3]
        if kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "truncate":
            del data[rng.randrange(len(data)) :]
        else:
            other = rng.choice([n for n in names if n != name])
            data = bytearray((path / other).read_bytes())
            if data == (path / name).read_bytes():
                data += b"\0"
        (path / name).write_bytes(data)
        try:
            Memory.load(path).close()
            silent.append(f"{kind} {name}")
        except (ValueError, FileNotFoundError):
            pass
        shutil.rmtree(path)
    return {"corruptions": number, "silent": silent}


def count_lists(memory: Memory, lists: int, forbidden: np.ndarray) -> dict[str, float]:
    """Retrieves for documents of the memory, and counts what must not happen."""
    retriever = Retriever(memory, StrategyConfig(require_multimodal=False))
    rng = np.random.default_rng(2)
    allowed = memory.allowed_ids()
    counts = dict.fromkeys(("lists", "forbidden", "self", "repeats", "full"), 0)
    for start in range(0, lists, 256):
        rows = rng.choice(allowed, min(256, lists - start))
        mains = memory.documents(rows)
        nums = np.full(len(rows), 2)
        results = retriever.retrieve(memory.queries(rows, "text", 1), nums, mains)
        for row, result in zip(rows, results, strict=True):
            texts = [d.segments[0].tokens.tobytes() for d in result.documents]
            own = memory.documents([row])[0].segments[0].tokens.tobytes()
            counts["lists"] += 1
            counts["forbidden"] += int(np.isin(result.ids, forbidden).sum())
            counts["self"] += int(row in result.ids or own in texts)
            counts["repeats"] += len(texts) - len(set(texts))
            counts["full"] += len(texts) == 2
    return {**counts, "full_share": counts["full"] / max(1, counts["lists"])}


def try_removal(memory: Path, out: Path, lists: int) -> dict[str, Any]:
    """1% of the documents removed: before and after reloading, and after compaction."""
    path = out / "removed"
    shutil.copytree(memory, path)
    with Memory.load(path) as opened:
        rng = np.random.default_rng(3)
        num = max(1, len(opened) // 100)
        rows = rng.choice(len(opened), num, replace=False)
        names = [d.id for d in opened.documents(rows)]
        opened.remove(rows)
        before = count_lists(opened, lists // 2, rows)
    with Memory.load(path) as opened:
        after = count_lists(opened, lists - lists // 2, rows)
    memory_edit.compact(path)
    memory_edit.verify(path)
    with Memory.load(path) as opened:
        left = int((opened.find(names) >= 0).sum())
    shutil.rmtree(path)
    return {"removed": num, "before": before, "after": after, "left_on_disk": left}


def try_ram(out: Path, num_documents: int, max_ram_gb: float) -> dict[str, Any]:
    """Peak resident memory of one build in a process of its own."""
    source = write_corpus(out / "ram_corpus", num_documents)
    child = start_build(source, out / "ram", index="scann", max_ram_gb=max_ram_gb)
    if child.wait():
        raise RuntimeError("the build failed")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return {"documents": num_documents, "max_ram_gb": max_ram_gb, "peak_gb": peak}


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        build(sys.argv[3], Path(sys.argv[4]), **json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("memory_faults"))
    parser.add_argument("--num_documents", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=35)
    parser.add_argument("--lists", type=int, default=100_000)
    parser.add_argument("--ram_documents", type=int, default=200_000)
    parser.add_argument("--max_ram_gb", type=float, default=2.0)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True)
    source = write_corpus(out / "corpus", arguments.num_documents)
    build(source, out / "whole")
    planted = write_corpus(out / "planted_corpus", arguments.num_documents, 0.3)
    build(planted, out / "planted", deduplicate="none")
    with Memory.load(out / "planted") as memory:
        nothing = np.zeros(0, np.int64)
        duplicates = count_lists(memory, arguments.lists, nothing)
    results: dict[str, Any] = {
        # First, since the peak of all children is what the system tells.
        "ram": try_ram(out, arguments.ram_documents, arguments.max_ram_gb)
        if arguments.ram_documents
        else None,
        "kills": try_kills(source, out, out / "whole", arguments.kills),
        "corruptions": try_corruptions(out / "whole", out, arguments.corruptions),
        "removal": try_removal(out / "whole", out, arguments.lists),
        "duplicates": duplicates,
    }
    removal, ram = results["removal"], results["ram"]
    results["expected"] = {
        "every killed build ends the same": results["kills"]["equal"]
        == arguments.kills,
        "no corruption is silent": not results["corruptions"]["silent"],
        "removed documents never appear": not (
            removal["before"]["forbidden"]
            or removal["after"]["forbidden"]
            or removal["left_on_disk"]
        ),
        "no self-hits": duplicates["self"] == 0,
        "no repeats": duplicates["repeats"] == 0,
        "99.9% of the lists are full": duplicates["full_share"] >= 0.999,
        "RAM within the limit + 15%": ram is None
        or ram["peak_gb"] <= 1.15 * ram["max_ram_gb"],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0 if all(results["expected"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
