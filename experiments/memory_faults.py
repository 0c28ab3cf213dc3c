"""Fault injection: crashes, corruption, removal, duplicates, shards, RAM, odd calls.

    python experiments/memory_faults.py --out=memory_faults --corruptions=200

Writes `results.json`. The expected results are in `expected`; the exit
status is 1 if one is not met. Needs no trained models: documents are tokenised by bytes
and embedded by hashing their words, so that a run tests only the memory. `--only`
runs some of the tests. Tiny form: --num_documents=400 --crash_every=25
--corruptions=7 --lists=400 --ram_documents=400.

Crashes are injected, not timed: every write, rename and delete of a build, an overwriting
build, an addition, a removal and a compaction is the last one once (`memory_crashes`).
The mistaken calls of the command line are those of the tests.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_crashes
import numpy as np

from racm3_jax import cli, storage, wiring
from racm3_jax.checkpoints import Checkpoints
from racm3_jax.documents.images import resize_image
from racm3_jax.index.scann import ScannIndex
from racm3_jax.index.sharded import ShardedIndex, merge_neighbours
from racm3_jax.memory import builder, edit
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

FILES = 8
NUM_WORDS = 2000
TESTS = ("ram", "crashes", "corruptions", "removal", "duplicates", "shards", "calls")


class ByteTokenizer:
    """Bytes of the text; four codes of an image's corner."""

    vocab = Vocab(
        num_text_ids=256, num_image_codes=256, image_length=4, num_sentinels=8
    )

    def fingerprint(self) -> str:
        return "bytes"

    def fit_images(self, images):
        return images

    def tokenize(self, documents):
        for document in documents:
            segments = []
            for segment in document.segments:
                if segment.image is None:
                    tokens = np.frombuffer(segment.text.encode(), np.uint8)
                else:
                    codes = segment.image[:2, :2, 0].ravel().astype(np.int32)
                    tokens = self.vocab.image_tokens(codes)
                tokens = tokens.astype(np.int32)
                segments.append(TokenizedSegment(segment.modality, tokens))
            yield TokenizedDocument(
                document.id,
                tuple(segments),
                document.source,
                dict(document.metadata),
            )


class WordEmbedder:
    """The mean of one random direction per word; a random projection of an image."""

    config = types.SimpleNamespace(image_size=8)

    def __init__(self, d_embed: int) -> None:
        self.d_embed = d_embed
        rng = np.random.default_rng(0)
        self._words = rng.standard_normal((NUM_WORDS, d_embed), np.float32)
        self._pixels = rng.standard_normal((3 * 8 * 8, d_embed), np.float32)

    def fingerprint(self) -> str:
        return "words"

    def embed_texts(self, texts, drop=0.0, rng=None):
        rows = []
        for text in texts:
            words = [int(word[1:]) for word in text.split()]
            if rng is not None and len(words) > 1:
                words = [w for w in words if rng.random() >= drop] or words[:1]
            rows.append(self._words[words].sum(axis=0))
        return _unit(np.stack(rows))

    def fit_images(self, images):
        return images

    def align(self, rows):
        return rows

    def embed_images(self, images, drop=0.0, rng=None):
        pixels = np.stack([resize_image(image, 8) for image in images])
        pixels = pixels.reshape(len(images), -1).astype(np.float32) - 128
        return _unit(pixels @ self._pixels)

    def embed_documents(self, documents: list[Document]):
        text = self.embed_texts([document.text for document in documents])
        image = np.zeros_like(text)
        with_image = [i for i, d in enumerate(documents) if d.images]
        if with_image:
            images = [documents[i].images[0] for i in with_image]
            image[with_image] = self.embed_images(images)
        return text, image, _unit(text + image)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def write_corpus(
    folder: Path, num_documents: int, planted: float = 0.0, images: bool = False
) -> str:
    """JSONL files of documents of eight words each; returns the source.

    Args:
      folder: made.
      num_documents: in all.
      planted: fraction of them that copy another one's words, under another id.
      images: each also has an image of 16 x 16 random pixels.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    words = rng.integers(0, NUM_WORDS, (num_documents, 8))
    copies = rng.random(num_documents) < planted
    for number in np.flatnonzero(copies):
        words[number] = words[rng.integers(num_documents)]
    for number, rows in enumerate(np.array_split(np.arange(num_documents), FILES)):
        with open(folder / f"{number:03d}.jsonl", "w") as file:
            for row in rows:
                text = " ".join(f"w{w}" for w in words[row])
                fields = {"id": f"d{row}", "text": text}
                if images:
                    pixels = rng.integers(0, 256, 16 * 16 * 3, np.uint8).tobytes()
                    data = base64.b64encode(b"P6 16 16 255\n" + pixels)
                    fields["image_base64"] = data.decode()
                file.write(json.dumps(fields) + "\n")
    return f"jsonl:{folder}/*.jsonl"


def build(source: str, path: Path, d_embed: int = 64, **settings: Any) -> None:
    config = builder.CorpusConfig(num_query_variants=1, **settings)
    builder.build_memory(
        source,
        tokenizer=ByteTokenizer(),
        embedder=WordEmbedder(d_embed),
        path=path,
        config=config,
    )


def digests(path: Path) -> dict[str, str]:
    names = storage.list_files(path)
    return {n: d["sha256"] for n, d in storage.describe_files(path, names).items()}


def try_crashes(out: Path, every: int) -> dict[str, Any]:
    """Every command of a memory, interrupted at every change of the file system."""
    sources = []
    for name, first, files in (("crash_corpus", 0, 2), ("crash_more", 8, 1)):
        (out / name).mkdir()
        for number in range(files):
            start = first + 4 * number
            lines = [
                {"id": f"d{n}", "text": f"w{n} w{n + 5}"}
                for n in range(start, start + 4)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / name / f"{number}.jsonl").write_text(text)
        sources.append(f"jsonl:{out / name}/*.jsonl")
    found = memory_crashes.try_operations(
        out / "crashes",
        (ByteTokenizer(), WordEmbedder(16)),
        (sources[0], sources[1]),
        builder.CorpusConfig(index="exact", num_query_variants=1),
        every=every,
    )
    public = out / "crash_public"
    if cli.main(
        ["export", str(wiring.resolve("shipped:flagworld") / "clip"), str(public)]
    ):
        raise RuntimeError("racm3 export failed")
    place = memory_crashes.ConvertPlace(out / "crash_convert", public)
    found["convert"] = memory_crashes.try_operation(place, place.convert, every)
    return {name: outcome.as_dict() for name, outcome in found.items()}


def open_weights(path: Path) -> None:
    wiring.load_generator(path, None)
    wiring.load_generator(path, None, model="twin")


def open_training(path: Path) -> None:
    """Restores the newest step, like a resuming training.

    Raises:
      ValueError: the newest step is not good, which is said and not used.
    """
    saver = Checkpoints(path / "checkpoints")
    try:
        newest = max(saver.steps())
        if saver.latest_good(quarantine=False) != newest:
            raise ValueError(f"step {newest} is not good")
    finally:
        saver.close()


def make_folders(
    memory: Path, out: Path
) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """A folder of every kind, and the function that opens it."""
    shipped = wiring.resolve("shipped:flagworld")
    folders = {name: out / name for name in ("weights", "tokenizer", "training")}
    shutil.copytree(shipped, folders["weights"])
    # The package's own list of all its files, which only `racm3 doctor` reads.
    (folders["weights"] / "manifest.json").unlink()
    shutil.copytree(shipped / "tokenizer", folders["tokenizer"])
    saver = Checkpoints(folders["training"] / "checkpoints")
    saver.save(1, {"w": np.arange(512, dtype=np.float32)}, {"config": "x"})
    saver.wait()
    saver.close()
    for words in (
        ["export", str(shipped / "clip"), str(out / "public")],
        ["convert", "clip", str(out / "public"), str(out / "converted")],
    ):
        if cli.main(words):
            raise RuntimeError(f"racm3 {' '.join(words)} failed")
    return {
        "memory": (memory, lambda path: Memory.load(path).close()),
        "weights": (folders["weights"], open_weights),
        "tokenizer": (folders["tokenizer"], MixedTokenizer.load),
        "converted": (out / "converted", DocumentEmbedder.load),
        "training": (folders["training"], open_training),
    }


def try_corruptions(memory: Path, out: Path, number: int) -> dict[str, Any]:
    """Bit flips, truncations and swapped files; each must be detected on opening.

    In turn for each folder: a memory, the weights of a work directory, a tokenizer,
    converted weights, the checkpoints of a training. Files that nothing opens again (logs,
    pictures) are left out.
    """
    rng, silent = random.Random(1), []
    folders = make_folders(memory, out)
    for path, open_folder in folders.values():
        open_folder(path)  # undamaged, it opens
    for i in range(number):
        kind, (whole, open_folder) = list(folders.items())[i % len(folders)]
        path = out / "damaged"
        shutil.copytree(whole, path)
        names = [n for n in storage.list_files(path) if not n.endswith(".png")]
        name = rng.choice(names)
        data = bytearray((path / name).read_bytes())
        change = rng.choice(("flip", "truncate", "swap")) if data else "grow"
        if change == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif change == "truncate":
            del data[rng.randrange(len(data)) :]
        elif change == "grow":
            data += b"\0"
        else:
            other = rng.choice([n for n in names if n != name])
            data = bytearray((path / other).read_bytes())
            if data == (path / name).read_bytes():
                data += b"\0"
        (path / name).write_bytes(data)
        try:
            open_folder(path)
            silent.append(f"{change} {kind}/{name}")
        except (ValueError, FileNotFoundError):
            pass
        shutil.rmtree(path)
    return {"corruptions": number, "folders": sorted(folders), "silent": silent}


def try_calls(out: Path) -> dict[str, Any]:
    """Mistaken calls of the command line, from the table of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "commands"))
    import odd_calls

    (out / "calls").mkdir()
    return odd_calls.run_odd_calls(out / "calls")


def count_lists(memory: Memory, lists: int, forbidden: np.ndarray) -> dict[str, float]:
    """Retrieves for documents of the memory, and counts violations."""
    retriever = Retriever(memory, StrategyConfig(require_multimodal=False))
    rng = np.random.default_rng(2)
    allowed = memory.allowed_ids()
    counts = dict.fromkeys(("lists", "forbidden", "self", "repeats", "full"), 0)
    for start in range(0, lists, 256):
        rows = rng.choice(allowed, min(256, lists - start))
        mains = memory.documents(rows)
        nums = np.full(len(rows), 2)
        results = retriever.retrieve(memory.queries(rows, "text", 1), nums, mains)
        for row, main, result in zip(rows, mains, results, strict=True):
            texts = [d.segments[0].tokens.tobytes() for d in result.documents]
            own = main.segments[0].tokens.tobytes()
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
    edit.compact(path)
    edit.verify(path)
    with Memory.load(path) as opened:
        left = int((opened.find(names) >= 0).sum())
    shutil.rmtree(path)
    return {"removed": num, "before": before, "after": after, "left_on_disk": left}


def try_shards(out: Path) -> dict[str, Any]:
    """Four shards, two in each of two processes, merged, and one index of all rows."""
    rng = np.random.default_rng(4)
    rows = _unit(rng.standard_normal((8000, 64), np.float32))
    queries = _unit(rng.standard_normal((500, 64), np.float32))
    whole = ScannIndex.build(rows, out / "one_index")
    ShardedIndex.build(ScannIndex, rows, out / "four_shards", rows_per_shard=2000)
    processes = multiprocessing.get_context("forkserver")
    with processes.Pool(2) as pool:
        held = [(out / "four_shards", n, queries) for n in ((0, 2), (1, 3))]
        parts = pool.starmap(_search_shards, held, chunksize=1)
    expected = whole.search(queries, 10)
    merged = merge_neighbours(parts, 10)
    return {
        "queries": len(queries),
        "equal_ids": int((merged.ids == expected.ids).all(axis=1).sum()),
        "equal_scores": bool((merged.scores == expected.scores).all()),
    }


def _search_shards(path: Path, numbers: tuple[int, ...], queries: np.ndarray) -> Any:
    return ShardedIndex.load(ScannIndex, path, only=numbers).search(queries, 10)


def try_ram(out: Path, num_documents: int, max_ram_gb: float) -> dict[str, Any]:
    """Peak resident memory of one build in a separate process."""
    source = write_corpus(out / "ram_corpus", num_documents, images=True)
    settings = {"d_embed": 256, "index": "scann", "max_ram_gb": max_ram_gb}
    words = [json.dumps(settings), source, str(out / "ram")]
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--child", *words], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    with Memory.load(out / "ram") as memory:
        kept, index = len(memory), memory.manifest["index"]
    shutil.rmtree(out / "ram")
    return {
        "documents": num_documents,
        "kept": kept,
        "index": index,
        "seconds": seconds,
        "max_ram_gb": max_ram_gb,
        "peak_gb": peak,
    }


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        build(sys.argv[3], Path(sys.argv[4]), **json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("memory_faults"))
    parser.add_argument("--num_documents", type=int, default=20_000)
    parser.add_argument("--crash_every", type=int, default=1)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--lists", type=int, default=100_000)
    parser.add_argument("--ram_documents", type=int, default=200_000)
    parser.add_argument("--max_ram_gb", type=float, default=0.6)
    parser.add_argument("--only", default=",".join(TESTS), help="some of these")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    out = arguments.out
    out.mkdir(parents=True)
    results = run_tests(out, arguments, [t for t in TESTS if t in chosen])
    results["expected"] = judge(results)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0 if all(results["expected"].values()) else 1


def run_tests(
    out: Path, arguments: argparse.Namespace, chosen: list[str]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    # First, since the system reports the peak of all child processes.
    if "ram" in chosen and arguments.ram_documents:
        results["ram"] = try_ram(out, arguments.ram_documents, arguments.max_ram_gb)
    if "crashes" in chosen:
        results["crashes"] = try_crashes(out, arguments.crash_every)
    if "corruptions" in chosen or "removal" in chosen:
        build(write_corpus(out / "corpus", arguments.num_documents), out / "whole")
    if "corruptions" in chosen:
        number = arguments.corruptions
        results["corruptions"] = try_corruptions(out / "whole", out, number)
    if "removal" in chosen:
        results["removal"] = try_removal(out / "whole", out, arguments.lists)
    if "duplicates" in chosen:
        planted = write_corpus(out / "planted_corpus", arguments.num_documents, 0.3)
        build(planted, out / "planted", deduplicate="none")
        with Memory.load(out / "planted") as memory:
            nothing = np.zeros(0, np.int64)
            found = count_lists(memory, arguments.lists, nothing)
            results["duplicates"] = {**found, **memory.manifest["report"]}
    if "shards" in chosen:
        results["shards"] = try_shards(out)
    if "calls" in chosen:
        results["calls"] = try_calls(out)
    return results


def judge(results: dict[str, Any]) -> dict[str, bool]:
    """The expected results of every test that ran, and whether they are met."""
    judged = {}
    if "ram" in results:
        ram = results["ram"]
        judged["RAM within the limit + 15%"] = (
            ram["peak_gb"] <= 1.15 * ram["max_ram_gb"]
        )
    if "crashes" in results:
        for kind in ("wrong", "failed", "leftovers"):
            judged[f"after any crash: no {kind}"] = not any(
                outcome[kind] for outcome in results["crashes"].values()
            )
    if "corruptions" in results:
        judged["no corruption is silent"] = not results["corruptions"]["silent"]
    if "removal" in results:
        removal = results["removal"]
        judged["removed documents never appear"] = not (
            removal["before"]["forbidden"]
            or removal["after"]["forbidden"]
            or removal["left_on_disk"]
        )
    if "duplicates" in results:
        duplicates = results["duplicates"]
        judged["no self-hits"] = duplicates["self"] == 0
        judged["no repeats"] = duplicates["repeats"] == 0
        judged["99.9% of the lists are full"] = duplicates["full_share"] >= 0.999
    if "calls" in results:
        for kind in ("tracebacks", "hangs", "partial", "sentences"):
            judged[f"odd calls: no {kind}"] = not results["calls"][kind]
    if "shards" in results:
        shards = results["shards"]
        judged["shards return what one index does"] = (
            shards["equal_scores"] and shards["equal_ids"] == shards["queries"]
        )
    return judged


if __name__ == "__main__":
    sys.exit(main())
