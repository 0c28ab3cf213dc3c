"""A compiled step in a file: trains like the step, and is refused where it must be."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from racm3_jax import run, sharding, wiring
from racm3_jax.compilation import saved
from racm3_jax.compilation.figures import compile_program
from racm3_jax.compilation.machines import Machine
from racm3_jax.compilation.programs import build_program
from racm3_jax.model.transformer import init_params
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import init_state
from racm3_jax.types import Batch


def make_config(**pipeline):
    sections = {
        "kind": "generator",
        "seed": 0,
        "init_from": "",
        "tokenizer": {"text": "", "image": "", "num_sentinels": 4},
        "embedder": "",
        **{name: {} for name in ("memory", "strategy", "masking")},
        "vocab": {
            "num_text_ids": 300,
            "num_image_codes": 16,
            "image_length": 4,
            "num_sentinels": 4,
        },
        "model": {
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "head_dim": 8,
            "d_ff": 32,
            "max_length": 32,
        },
        "loss": {"z_loss": 1e-5},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "mesh": {"data": 2, "fsdp": 2},
        "pipeline": {"rows": 4, "row_length": 16, "examples_per_batch": 4} | pipeline,
        "train": {"num_steps": 9, "checkpoint_every": 5, "log_every": 1},
    }
    return ConfigDict(sections)


def make_batch(rng, rows=4, length=16):
    ids = rng.integers(5, 300, (rows, length + 1)).astype(np.int32)
    return Batch(
        inputs=ids[:, :-1],
        targets=ids[:, 1:],
        loss_weights=np.ones((rows, length), np.float32),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        is_main=np.ones((rows, length), bool),
    )


@pytest.fixture(scope="module")
def training():
    config = make_config()
    return config, wiring.build_abstract_training(config, jax.devices()[:4])


@pytest.fixture(scope="module")
def first_state(training):
    """Makes the first state, from arrays that were computed once."""
    config, abstract = training
    model_config = wiring.build_model_config(config, wiring.build_vocab(config))
    settings = OptimizerConfig(num_steps=9, **config.optimizer)
    state = init_state(
        lambda key: init_params(model_config, key, boxed=True),
        build_optimizer(settings),
        abstract.mesh,
        jax.random.key(0),
    )
    places = jax.tree.map(lambda x: x.sharding, state)
    held = jax.tree.map(np.array, state)
    # Copied: device_put may alias the host's memory, and steps donate their state.
    return lambda: jax.tree.map(
        lambda x, place: jax.device_put(x.copy(), place), held, places
    )


@pytest.fixture(scope="module")
def file(training, tmp_path_factory):
    """A file of `racm3 estimate --device=cpu:4 --compile --save`."""
    config, abstract = training
    program = build_program("train", config, jax.devices()[:4])
    machine = Machine("cpu", 4, "")
    with saved.without_cache():
        figures, parts = compile_program(program, machine, program.size, None)
    assert figures.fits and figures.parts[0].arguments > 0
    path = tmp_path_factory.mktemp("saved") / "step"
    traced = program.trace(program.size)["training step"]
    saved.save_step(
        path, parts["training step"], traced, abstract.mesh, config.to_dict()
    )
    return path


def load(file, config, training):
    return saved.load_step(
        file, training.step, training.state, training.batch, config.to_dict()
    )


def test_training_from_the_file_is_the_same_training(file, training, first_state):
    config, abstract = training
    stored = load(file, config, abstract)
    found = []
    for step in (abstract.step, stored):
        state = first_state()
        losses = []
        rng = np.random.default_rng(0)
        for _ in range(4):
            before = state
            state, metrics = step(state, make_batch(rng))
            losses.append(float(metrics["objective"][0]))
            assert before.params["embedding"].is_deleted()  # donated
        found.append((losses, jax.device_get(state)))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) == 4
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])
    state, _ = stored(first_state(), make_batch(rng))
    places = jax.tree.map(lambda x: x.sharding, (state, abstract.state))
    assert jax.tree.leaves(places[0]) == jax.tree.leaves(places[1])


def test_a_run_starts_and_resumes_from_the_file(
    training, file, first_state, tmp_path, monkeypatch
):
    config, abstract = training
    config = config.copy_and_resolve_references()
    monkeypatch.setattr(run.wiring, "build_mesh", lambda config: abstract.mesh)
    fresh = wiring.build_abstract_training(config, jax.devices()[:4])

    def build_job(config, workdir):
        return wiring.Job(
            first_state(),
            fresh.step,
            lambda start: (
                make_batch(np.random.default_rng(i)) for i in range(start, 9)
            ),
            config.train.num_steps,
            lambda state: None,
        )

    monkeypatch.setattr(run.wiring, "build_job", build_job)

    def losses(workdir):
        lines = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["objective"] for line in lines]

    plain = run.train(config, tmp_path / "plain", progress=False)
    calls = fresh.step.compiled._cache_size()
    stored = run.train(config, tmp_path / "stored", progress=False, compiled=file)
    assert fresh.step.compiled._cache_size() == calls  # nothing was compiled
    assert losses("plain") == losses("stored") and len(losses("plain")) == 9
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((plain, stored)))
    # The saved step of another training does not touch the work directory.
    config.optimizer.b1 = 0.5
    fresh = wiring.build_abstract_training(config, jax.devices()[:4])
    with pytest.raises(saved.CompiledFileError, match="b1 was None"):
        run.train(config, tmp_path / "other", progress=False, compiled=file)
    assert not (tmp_path / "other").exists()


def test_another_batch_shape_is_refused(file, training, first_state):
    config, abstract = training
    stored = load(file, config, abstract)
    state = first_state()
    with pytest.raises(ValueError, match=r"\(8, 16\).* instead of \(\(4, 16\)"):
        stored(state, make_batch(np.random.default_rng(0), rows=8))


def test_another_config_is_refused_naming_the_settings(file):
    config = make_config(rows=8)
    other = wiring.build_abstract_training(config, jax.devices()[:4])
    with pytest.raises(saved.CompiledFileError, match=r"pipeline\.rows was 4 and is 8"):
        load(file, config, other)
    config = make_config()
    config.optimizer.b1 = 0.5
    other = wiring.build_abstract_training(config, jax.devices()[:4])
    with pytest.raises(saved.CompiledFileError, match=r"b1 was None and is 0\.5"):
        load(file, config, other)


def test_other_code_is_refused_with_an_equal_config(file, training, monkeypatch):
    config, abstract = training
    monkeypatch.setattr(saved, "fingerprint", lambda traced: "another")
    with pytest.raises(saved.CompiledFileError, match="so the code has changed"):
        load(file, config, abstract)


def test_another_machine_is_refused(file, training):
    _, abstract = training
    saved.check_step(file, abstract.mesh)
    with pytest.raises(saved.CompiledFileError, match="number 4, here is 2"):
        saved.check_step(file, sharding.make_mesh(2, devices=jax.devices()[:2]))
    with pytest.raises(saved.CompiledFileError, match="mesh {.*here is"):
        saved.check_step(file, sharding.make_mesh(4, devices=jax.devices()[:4]))


def test_another_version_is_refused(file, training, monkeypatch):
    _, abstract = training
    monkeypatch.setattr(saved, "find_versions", lambda mesh: {"racm3_jax": "99"})
    with pytest.raises(saved.CompiledFileError, match="here is 99"):
        saved.check_step(file, abstract.mesh)


def test_damage_is_detected_before_anything_is_loaded(file, training, tmp_path):
    config, abstract = training
    data = file.read_bytes()
    for name, content in {
        "cut": data[:-1],
        "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "head": data.replace(b'"number": 4', b'"number": 8', 1),
        "other": b"PK\x03\x04" + data,
        "empty": b"",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(saved.CompiledFileError, match="damaged|is not a compiled"):
            load(path, config, abstract)
    with pytest.raises(saved.CompiledFileError, match="there is no file"):
        load(tmp_path / "absent", config, abstract)


def test_only_its_own_files_are_replaced(file, training, tmp_path):
    _, abstract = training
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(saved.CompiledFileError, match="not replaced"):
        saved.save_step(foreign, None, None, abstract.mesh, {})  # type: ignore[arg-type]
    assert foreign.read_text() == "mine"


def test_a_program_is_identified_by_its_computation(training):
    """Equal in every process, and different when an operation changes."""
    config, abstract = training
    traced = [
        saved.trace_step(abstract.step, abstract.state, abstract.batch),
        saved.trace_step(
            wiring.build_abstract_training(config, jax.devices()[:4]).step,
            abstract.state,
            abstract.batch,
        ),
    ]
    assert saved.fingerprint(traced[0]) == saved.fingerprint(traced[1])
    config = make_config()
    config.loss.z_loss = 2e-5
    other = wiring.build_abstract_training(config, jax.devices()[:4])
    changed = saved.trace_step(other.step, other.state, other.batch)
    assert saved.fingerprint(changed) != saved.fingerprint(traced[0])


def test_the_file_has_no_pickle(file):
    line, _, payload = file.read_bytes().partition(b"\n")
    head = json.loads(line)
    assert head["payload_bytes"] == len(payload)
    assert not payload.startswith(b"\x80")
