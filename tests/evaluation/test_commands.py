"""`racm3 evaluate` in separate processes: killed, resumed, and two at once. Slow."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from evaluation_fakes import digest, make_coco

from racm3_jax import wiring
from racm3_jax.documents.readers import read_documents
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import init_params
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.tokenizers.mixed import MixedTokenizer

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# 30 images of 6 nations or more.
TRAIN = "flagworld:train;num_nations=12;max_documents=30"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A COCO-like folder, a small random model, and its memory."""
    place = tmp_path_factory.mktemp("place")
    make_coco(place / "coco", 220)
    shipped = wiring.resolve("shipped:flagworld")
    tokenizer = MixedTokenizer.load(shipped / "tokenizer")
    embedder = DocumentEmbedder.load(shipped / "clip")
    config = tiny(vocab_size=tokenizer.vocab.size, max_length=320, num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    strategy = StrategyConfig(max_similarity=2.0)
    wiring.save_generator(
        place / "model", config, params, tokenizer, embedder, strategy
    )
    Memory.build(
        list(read_documents(TRAIN)),
        tokenizer=tokenizer,
        embedder=embedder,
        path=place / "memory",
        index="exact",
        num_query_variants=0,
    ).close()
    return place


def start(place, workdir, suite, *flags, **environment):
    """A process of `racm3 evaluate` with one device."""
    command = [
        *(sys.executable, "-m", "racm3_jax.cli", "--traceback", "evaluate"),
        f"--suite={suite.partition(':')[0]}",
        f"--workdir={workdir}",
        f"--config={ROOT}/configs/eval/{suite.replace(':', '.py:', 1)}"
        + ("" if ":" in suite else ".py"),
        f"--config.models={place / 'model'}",
        "--config.settings.num_resamples=20",
        "--config.settings.chunk_size=20",
        "--config.settings.num_sheet_rows=3",
        *flags,
    ]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def start_coco(place, workdir, task, **environment):
    flags = [
        f"--config.coco={place / 'coco'}",
        f"--config.memory={place / 'memory'}",
        f"--config.num_items={200 if task == 'text_to_image' else 150}",
        "--config.settings.image_size=64",
        "--config.settings.num_samples=2",
        "--config.settings.num_distance_resamples=3",
        "--config.strategy.max_similarity=2.0",
    ]
    return start(place, workdir, f"coco:{task}", *flags, **environment)


def start_likelihood(place, workdir, **environment):
    flags = [
        f"--config.source={TRAIN}",
        f"--config.memory_path={place / 'memory'}",
        "--config.twin=",
        "--config.settings.num_episodes=30",
        "--config.settings.shots=(0, 1)",
        # These are the documents of the memory: removing near-duplicates would leave none.
        "--config.settings.max_similarity=2.0",
        "--config.strategy.max_similarity=2.0",
    ]
    return start(place, workdir, "likelihood", *flags, **environment)


def kill_in_the_middle(process, workdir, num_parts):
    """Kills a process (`kill -9`) once it has written `num_parts` chunks."""
    while len(list(workdir.rglob("parts/*.npz"))) < num_parts:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (workdir / "results.json").exists()


def two_processes(begin, place, workdir, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        begin(
            place,
            workdir,
            *arguments,
            RACM3_COORDINATOR=f"127.0.0.1:{port}",
            RACM3_NUM_PROCESSES="2",
            RACM3_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]


def check_equal(one, others):
    for other in others:
        for name in ("results.json", "table.md", "samples.png"):
            assert digest(one / name) == digest(other / name), (other, name)


@pytest.mark.parametrize("task", ["text_to_image", "captioning"])
def test_coco_killed_resumed_and_with_two_processes(place, tmp_path, task):
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    assert start_coco(place, whole, task).wait() == 0
    kill_in_the_middle(start_coco(place, killed, task), killed, 14)
    assert start_coco(place, killed, task).wait() == 0
    two_processes(start_coco, place, two, task)
    check_equal(whole, [killed, two])
    results = json.loads((whole / "results.json").read_text())["results"]
    figure = "clip_score" if task == "text_to_image" else "cider"
    for variant in ("retrieval", "no_retrieval", "copy", "random"):
        assert results[f"{variant}/{figure}"]["total"] >= 150


def test_likelihood_killed_resumed_and_with_two_processes(place, tmp_path):
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    assert start_likelihood(place, whole).wait() == 0
    kill_in_the_middle(start_likelihood(place, killed), killed, 3)
    assert start_likelihood(place, killed).wait() == 0
    two_processes(start_likelihood, place, two)
    check_equal(whole, [killed, two])
    results = json.loads((whole / "results.json").read_text())["results"]
    assert results["retrieval/bits_per_image"]["total"] == 30
    assert results["recall/text_to_document@1"]["total"] == 30
    assert results["kshot/1/model"]["total"] == 30
