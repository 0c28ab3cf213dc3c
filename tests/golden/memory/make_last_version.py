"""Makes `last_version.zip`: a memory as racm3_jax 0.1.0 (commit 93e2b4e) wrote it.

    git worktree add /tmp/last 93e2b4e
    PYTHONPATH=/tmp/last:/tmp/last/tests/retrieval python tests/golden/memory/make_last_version.py

Eight documents of a source, one added, a removal, a compaction, one more added and one
more removed: every file that a memory of that version may have. A second memory has
documents from Python (`Memory.build`, without content hashes).
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import zipfile

from racm3_jax.retrieval.corpus_build import CorpusConfig, build_corpus, make_maker
from racm3_jax.retrieval.memory import Memory
from retrieval_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax.retrieval import memory_edit

HERE = pathlib.Path(__file__).parent
MODELS = {"tokenizer": FakeTokenizer(), "embedder": FakeEmbedder()}


def write(folder: pathlib.Path, numbers: list[int]) -> str:
    lines = [
        json.dumps({"id": f"doc-{n}", "caption": make_document(n).text})
        for n in numbers
    ]
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/*.jsonl"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        config = CorpusConfig("exact", num_query_variants=1)
        path, maker = work / "from_source", make_maker(config, *MODELS.values())
        build_corpus(write(work / "a", [*range(8)]), path=path, config=config, **MODELS)
        for number in (8, 9):
            source = write(work / f"b{number}", [number])
            memory_edit.add_documents(path, source, maker)
            with Memory.load(path) as memory:
                memory.remove([number - 7])
            if number == 8:
                memory_edit.compact(path)
        documents = [make_document(n) for n in range(4)]
        settings = {"index": "exact", "num_query_variants": 1}
        Memory.build(documents, path=work / "from_python", **MODELS, **settings)
        with zipfile.ZipFile(
            HERE / "last_version.zip", "w", zipfile.ZIP_DEFLATED
        ) as archive:
            for folder in ("from_source", "from_python"):
                for file in sorted((work / folder).rglob("*")):
                    if file.is_file():
                        archive.write(file, file.relative_to(work))


if __name__ == "__main__":
    main()
