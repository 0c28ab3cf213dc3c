"""One generator for all tests of the tasks, and an ear at its decode loop."""

from __future__ import annotations

import pytest
from generation_standins import draw_by_grammar, make_generator

from racm3_jax.generation import sample as sample_module


@pytest.fixture(scope="session")
def generator():
    return make_generator()


class Ear(list):
    """The prompts that reach `sample`, without padding; and all that it was called with."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.calls = []

    def __call__(self, model, params, tokens, lengths, *args, **kwargs):
        self.extend(row[:n].tolist() for row, n in zip(tokens, lengths, strict=True))
        samples = self.draw(model, params, tokens, lengths, *args, **kwargs)
        self.calls.append(((model, params, tokens, lengths), kwargs, samples))
        return samples


@pytest.fixture
def prompts_seen(monkeypatch):
    """Hears what the real loop is asked."""
    ear = Ear(sample_module.sample)
    monkeypatch.setattr("racm3_jax.generation.batching.sample", ear)
    return ear


@pytest.fixture
def quick(monkeypatch):
    """Hears what the loop is asked; random ids come back, as the grammar allows."""
    ear = Ear(draw_by_grammar)
    monkeypatch.setattr("racm3_jax.generation.batching.sample", ear)
    return ear
