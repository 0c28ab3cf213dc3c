"""One generator for all tests of the tasks, and a recorder of its decode loop's prompts."""

from __future__ import annotations

import pytest
from generation_standins import make_generator, sample_by_grammar

from racm3_jax.generation import sample as sample_module


@pytest.fixture(scope="session")
def generator():
    return make_generator()


class PromptRecorder(list):
    """The prompts that reach `sample`, without padding; and all that it was called with."""

    def __init__(self, sample):
        super().__init__()
        self.sample = sample
        self.calls = []

    def __call__(self, model, params, tokens, lengths, *args, **kwargs):
        self.extend(row[:n].tolist() for row, n in zip(tokens, lengths, strict=True))
        samples = self.sample(model, params, tokens, lengths, *args, **kwargs)
        self.calls.append(((model, params, tokens, lengths), kwargs, samples))
        return samples


@pytest.fixture
def prompts_seen(monkeypatch):
    """Records the prompts of the real loop."""
    recorder = PromptRecorder(sample_module.sample)
    monkeypatch.setattr("racm3_jax.generation.batching.sample", recorder)
    return recorder


@pytest.fixture
def quick(monkeypatch):
    """Records prompts; instead of the loop, random tokens that the grammar allows."""
    recorder = PromptRecorder(sample_by_grammar)
    monkeypatch.setattr("racm3_jax.generation.batching.sample", recorder)
    return recorder
