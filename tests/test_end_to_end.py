"""The whole workflow with the shipped tokenizer and CLIP, and a tiny model."""

import dataclasses
import json
import os
import pathlib
import socket

import fsspec
import jax
import numpy as np
import pytest

from racm3_jax import cli, run, storage, wiring
from racm3_jax.checkpoints import Checkpoints
from racm3_jax.commands import configs
from racm3_jax.flagworld import read_flagworld
from racm3_jax.memory.memory import Memory

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def tiny(arg=""):
    return configs.read_config([f"--config={CONFIGS}/flagworld_tiny.py:{arg}"])


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Work directory, last state and job of an uninterrupted training."""
    workdir, jobs = tmp_path_factory.mktemp("uninterrupted"), []
    build = wiring.build_job

    def build_once(*args):
        jobs.append(build(*args))
        return jobs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "build_job", build_once)
        state = run.train(tiny(), workdir, progress=False)
    return workdir, state, jobs[0]


@pytest.fixture(scope="module")
def uninterrupted(trained):
    return trained[:2]


@pytest.fixture(scope="module")
def step_fn(trained):
    """Its program: traced once for the trainings whose step is not what is tested."""
    return trained[2].step_fn


def test_four_steps_equal_two_and_two(uninterrupted, step_fn, tmp_path, capsys):
    """With live retrieval, bit for bit; training really stops at a checkpoint."""
    _, state = uninterrupted
    job = wiring.build_job(tiny(), tmp_path)
    half = dataclasses.replace(
        job, num_steps=2, step_fn=step_fn, export=lambda state: None
    )
    original = wiring.build_job
    wiring.build_job = lambda config, workdir: half
    try:
        stopped = run.train(tiny(), tmp_path, progress=False)
    finally:
        wiring.build_job = original
    assert int(stopped.step) == 2
    resumed = run.train(tiny(), tmp_path)
    assert f"resuming {tmp_path} after step 2 of 4\n" in capsys.readouterr().err
    assert int(resumed.step) == int(state.step) == 4
    for a, b in zip(leaves(state), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_work_directory_in_a_bucket_is_resumed_elsewhere(
    uninterrupted, step_fn, monkeypatch
):
    """By a process that only has the bucket; bit for bit, too."""
    _, state = uninterrupted
    url, build = "memory://runs/bucket", wiring.build_job

    def whole(*args):
        return dataclasses.replace(build(*args), step_fn=step_fn)

    def half(*args):
        return dataclasses.replace(whole(*args), num_steps=2, export=lambda state: None)

    monkeypatch.setattr(wiring, "build_job", half)
    stopped = run.train(tiny(), url, progress=False)
    monkeypatch.setattr(wiring, "build_job", whole)
    assert int(stopped.step) == 2
    resumed = run.train(tiny(), url, progress=False)
    for a, b in zip(leaves(state), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    names = fsspec.filesystem("memory").find("/runs/bucket")
    assert "/runs/bucket/model/model.safetensors" in names
    config = tiny()
    config.optimizer.learning_rate = 1.0
    with pytest.raises(ValueError, match="memory://runs/bucket holds a run of another"):
        run.train(config, url, progress=False)


def test_metrics_name_both_modalities(uninterrupted):
    workdir, _ = uninterrupted
    lines = [
        json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == 4
    assert {"text_loss", "image_loss", "retrieved", "fill"} <= set(lines[-1])
    assert lines[-1]["retrieved"] > 0
    assert (workdir / "loss.png").stat().st_size > 1000


def test_another_config_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    config = tiny()
    config.optimizer.learning_rate = 1.0
    with pytest.raises(ValueError, match=r"config.optimizer.learning_rate"):
        run.train(config, workdir, progress=False)


def test_another_memory_is_refused(trained, monkeypatch):
    """For example one that grew: its rows may be other documents."""
    workdir, state, job = trained
    with Checkpoints(workdir / "checkpoints") as saver:
        step = saver.latest_good()
        _, extra = saver.restore(step, state)
    with Memory.load(workdir / "memory") as memory:
        assert extra["inputs"]["memory"] == memory.fingerprint()
        assert extra["num_main_documents"] == memory.num_allowed > 0
    for name in job.inputs:
        other = dataclasses.replace(job, inputs={**job.inputs, name: "another"})
        monkeypatch.setattr(wiring, "build_job", lambda *_, other=other: other)
        with pytest.raises(ValueError, match=f"was trained with the {name} .* another"):
            run.train(tiny(), workdir, progress=False)


def test_two_trainings_in_one_work_directory_are_refused(uninterrupted):
    workdir, _ = uninterrupted
    assert (workdir / run.LOCK_NAME).exists()  # even if its owner has ended
    with storage.claimed(workdir / run.LOCK_NAME, "a training"):
        own = f"host {socket.gethostname()}, process {os.getpid()}"
        with pytest.raises(ValueError, match=f"a training in .* \\({own}\\): wait"):
            run.train(tiny(), workdir, progress=False)


@pytest.fixture(scope="module")
def generator(uninterrupted):
    return run.load(uninterrupted[0])


def test_generate_and_caption(generator):
    out = generator.text_to_image("the flag of Velmoria on the moon", num_samples=2)
    assert [x.shape for x in out.images] == [(64, 64, 3)] * 2
    assert len(out.retrieved.documents) == 2
    named = generator.caption(out.images[0], num_retrieved=1)
    assert isinstance(named.texts[0], str)
    assert named.documents[0].metadata["retrieved"] == [named.retrieved.documents[0].id]


def test_command_line_names_retrieved_documents(uninterrupted, tmp_path, capsys):
    workdir, _ = uninterrupted
    image_path = tmp_path / "x.png"
    arguments = [f"--workdir={workdir}", "--json", "--seed=3"]
    prompt = "--prompt=the flag of Velmoria on the moon"
    assert cli.main(["generate", prompt, f"--out={image_path}", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["retrieved"]) == 2 and image_path.stat().st_size > 100
    assert cli.main(["caption", f"--image={image_path}", *arguments]) == 0
    captioned = json.loads(capsys.readouterr().out)
    assert captioned["captions"] and captioned["retrieved"][0]["score"] <= 1.0001


def test_removed_documents_are_never_retrieved(uninterrupted, tmp_path):
    """Removal needs no training, and survives reopening."""
    config, workdir = tiny(), uninterrupted[0]
    plain = run.load(workdir)
    path = tmp_path / "memory"
    documents = list(read_flagworld(wiring.build_world(config), "heldout_memory"))
    Memory.build(
        documents, tokenizer=plain.tokenizer, embedder=plain.embedder, path=path
    )
    nation = documents[0].metadata["nation"]
    ask = f"the flag of {nation} in the {documents[0].metadata['scene']}"

    def given():
        out = run.load(workdir, memory=path).text_to_image(ask)
        return [d.id for d in out.retrieved.documents]

    first = given()
    memory = Memory.load(path)
    memory.remove(memory.find(first))
    memory.close()
    assert not set(first) & set(given())


def test_memory_of_another_encoder_is_refused(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    plain = run.load(workdir)
    documents = read_flagworld(wiring.build_world(tiny()), "heldout_memory")

    class Other:
        def __getattr__(self, name):
            return getattr(plain.embedder, name)

        def fingerprint(self):
            return "another"

    Memory.build(
        documents, tokenizer=plain.tokenizer, embedder=Other(), path=tmp_path / "m"
    )
    with pytest.raises(ValueError, match="built with encoder another"):
        run.load(workdir, memory=tmp_path / "m")


def test_invalid_calls_are_refused_in_one_sentence(generator):
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.text_to_image("  ")
    with pytest.raises(ValueError, match="memory holds only"):
        generator.text_to_image("a flag", num_retrieved=10_000)
