"""Guesses change how many passes an image takes, and nothing else."""

from __future__ import annotations

import functools
import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.generation import decoding, draft_choice
from racm3_jax.generation import drafts as D
from racm3_jax.generation.grammar import image_grammar, interleaved_grammar
from racm3_jax.generation.sample import SamplingConfig, Unconditional, sample
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import Transformer, init_params
from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=20, num_image_codes=8, image_length=16, num_sentinels=2)
CODES = VOCAB.image_range
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = np.minimum(RNG.integers(0, 8, (64, 16)), RNG.integers(0, 8, (64, 16)))
TABLE = D.count_table(IMAGES)
FREE = SamplingConfig(max_new_tokens=16, fixed_length=True, top_p=0.95)
GUIDED = SamplingConfig(max_new_tokens=16, fixed_length=True, guidance=2.0, top_p=0.9)


def drafter(source, window=4):
    return D.Drafter(source, window, (CODES.start, CODES.stop), VOCAB.image_length)


@functools.cache
def make_model():
    config = tiny(vocab_size=VOCAB.size, max_length=64, num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, KEY)
    return Transformer(config), jax.tree.map(lambda x: x * 3, params)


def sample_codes(
    config, drafts, *, num_samples=40, grammar=None, token_range=CODES, **more
):
    """Two prompts after documents of 5 and 3 tokens, and the same without their texts."""
    prompts = np.array([[1, 2, 3, 4, 5, 7, 8, 9], [1, 2, 3, 6, 11, 0, 0, 0]], np.int32)
    plain = np.array([[1, 2, 3, 4, 5, 9], [1, 2, 3, 9, 0, 0]], np.int32)
    prefixes = np.array([5, 3])
    return sample(
        *make_model(),
        prompts,
        np.array([8, 5]),
        grammar or image_grammar(VOCAB),
        config,
        KEY,
        num_samples=num_samples,
        prefix_lengths=prefixes,
        unconditional=Unconditional(plain, np.array([6, 4]), prefixes),
        token_range=token_range,
        drafts=drafts,
        **more,
    )


def check_equal(drafted, plain):
    """Up to rounding: 99.9% of the codes."""
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)
    same = drafted.tokens == plain.tokens
    assert same.mean() >= 0.999
    np.testing.assert_allclose(
        drafted.log_probs[same], plain.log_probs[same], atol=1e-3
    )


@pytest.mark.parametrize(
    ("config", "source"),
    [(FREE, "table"), (FREE, "jacobi"), (GUIDED, "table")],
)
def test_guesses_change_no_code(config, source):
    table = TABLE if source == "table" else None
    plain = sample_codes(config, None)
    drafted = sample_codes(config, D.Drafts(drafter(source), table))
    check_equal(drafted, plain)
    assert (plain.passes == 16).all() and not plain.tested.any()
    assert (drafted.passes < 16).any() and (drafted.passes <= 16).all()
    # A pass gives the right guesses and one more token, if it is not at the end.
    assert np.isin(drafted.accepted + drafted.passes, (16, 17)).all()
    assert (drafted.accepted <= drafted.tested).all()
    counts = drafted.count_drafts(0)
    assert counts.source == source and counts.window == 4
    assert 0 < counts.acceptance == drafted.accepted[0].sum() / drafted.tested[0].sum()


def test_sampling_settings_do_not_recompile():
    """CD-K, temperature 0, min-p and another table use the programs of `GUIDED`."""
    other = D.Drafts(drafter("table"), D.count_table(IMAGES[:8]))
    how = (
        {"contrastive_k": 2, "temperature": 0.7},
        {"guidance": 3, "temperature": 0.0},
        {"guidance": 3, "min_p": 0.5},
    )
    configs = [
        SamplingConfig(max_new_tokens=16, fixed_length=True, **changes)
        for changes in how
    ]
    sample_codes(GUIDED, other), sample_codes(GUIDED, None)
    programs = decoding.decode_steps, decoding.init_decode_state
    sizes = [program._cache_size() for program in programs]
    for config in configs:
        check_equal(sample_codes(config, other), sample_codes(config, None))
    assert sizes == [program._cache_size() for program in programs]


def test_forced_ids_and_parts_of_images():
    """A region in two spans: forced tokens between them; each row has its own length."""
    cells = np.array([[5, 6, 7, -1, -1, 9, 10], [0, 1, 2, 3, -1, -1, -1]], np.int32)
    forced = np.full((2, 7), -1, np.int32)
    forced[0, 1] = CODES.start + 3
    forced[0, 3:5] = VOCAB.eoss, VOCAB.sentinel(1)
    known = np.tile(IMAGES[0], (2, 1)).astype(np.int32)
    known[0, [5, 7, 9, 10]] = known[1, :4] = -1
    config = SamplingConfig(max_new_tokens=7)
    more = {"forced": forced, "row_lengths": np.array([7, 4])}
    grammar = image_grammar(VOCAB, 7)
    drafts = D.Drafts(drafter("table"), TABLE, cells, known)
    drafted = sample_codes(config, drafts, grammar=grammar, **more)
    check_equal(drafted, sample_codes(config, None, grammar=grammar, **more))
    assert (drafted.tokens[0, :, [1, 3, 4]].T == forced[0, [1, 3, 4]]).all()
    assert (drafted.passes[0] <= 4).all()  # certain tokens are always guessed
    assert (drafted.tested[0] <= 3).all()  # and is not counted


def test_texts_between_images_and_reports():
    grammar = interleaved_grammar(VOCAB, 3, 2)
    config = SamplingConfig(max_new_tokens=34)
    drafts = D.Drafts(drafter("table"), TABLE)
    reports = []
    room = np.array([34, 34])
    more = {
        "grammar": grammar,
        "token_range": None,
        "row_lengths": room,
        "num_samples": 16,
    }
    drafted = sample_codes(config, drafts, on_progress=reports.append, **more)
    check_equal(drafted, sample_codes(config, None, **more))
    assert VOCAB.is_image(drafted.tokens).any() and (drafted.tokens < 20).any()
    assert (drafted.passes < drafted.lengths).any()
    # Outside of images nothing is guessed: one token per pass.
    columns = np.asarray(grammar.allowed).copy()
    columns[:, CODES.start : CODES.stop] = False
    more["grammar"] = grammar._replace(allowed=jnp.asarray(columns))
    texts = sample_codes(config, drafts, on_progress=[].append, **more)
    assert not texts.tested.any() and texts.lengths.max() > 1
    np.testing.assert_array_equal(texts.passes, texts.lengths)
    for report in reports:
        shown = drafted.tokens[..., : report.num_sampled]
        np.testing.assert_array_equal(report.tokens, shown)
    assert reports[-1].num_sampled >= drafted.lengths.max()


@flax.struct.dataclass
class LastCodes:
    """The cache of `PairModel`: the tokens read, and how many of them are kept."""

    tokens: jax.Array
    length: jax.Array

    def repeat(self, num_samples):
        return jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), self)

    def advance(self, counts):
        return LastCodes(self.tokens, self.length + counts)


class PairModel:
    """Logits depend only on the last token: a Markov chain with known frequencies."""

    config = types.SimpleNamespace(max_length=64)

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables["params"]["pairs"], *args)

    def prefill(self, pairs, tokens, lengths, max_length):
        rows = jnp.arange(len(tokens))
        read = jnp.zeros((len(tokens), max_length), jnp.int32)
        read = read.at[:, : tokens.shape[1]].set(tokens)
        return pairs[tokens[rows, lengths - 1]], LastCodes(read, lengths)

    def decode_window(self, pairs, tokens, cache):
        rows = jnp.arange(len(tokens))[:, None]
        places = cache.length[:, None] + jnp.arange(tokens.shape[1])
        read = cache.tokens.at[rows, places].set(tokens, mode="drop")
        return pairs[read[rows, places]], LastCodes(read, cache.length)

    def decode(self, pairs, token, cache):
        logits, cache = self.decode_window(pairs, token[:, None], cache)
        return logits[:, 0], cache.advance(1)


def test_frequencies_follow_the_model():
    """Chi-square of pairs of neighbouring codes over 6,000 images of four."""
    vocab = Vocab(num_text_ids=4, num_image_codes=5, image_length=4, num_sentinels=1)
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(vocab.size, vocab.size)).astype(np.float32)
    codes = vocab.image_range
    drafts = D.Drafts(
        D.Drafter("table", 4, (codes.start, codes.stop), 4),
        D.count_table(rng.integers(0, 5, (8, 4))),
    )
    prompt = np.array([[1, 2]], np.int32)
    samples = sample(
        PairModel(), {"pairs": jnp.asarray(pairs)}, prompt, np.array([2]),
        image_grammar(vocab), SamplingConfig(max_new_tokens=4, fixed_length=True), KEY,
        num_samples=6000, drafts=drafts,
    )  # fmt: skip
    assert 0.05 < samples.accepted.sum() / samples.tested.sum() < 0.95
    got = vocab.image_codes(samples.tokens[0])
    weights = np.exp(pairs[:, codes.start : codes.stop].astype(np.float64))
    moves = weights / weights.sum(1, keepdims=True)
    before = moves[2]
    for place in range(3):
        joint = before[:, None] * moves[codes.start : codes.stop]
        counts = np.zeros((5, 5))
        np.add.at(counts, (got[:, place], got[:, place + 1]), 1)
        chi_square = ((counts - 6000 * joint) ** 2 / (6000 * joint)).sum()
        assert chi_square < 51.2  # 24 degrees of freedom, p = 0.001
        before = joint.sum(0)


def test_a_table_holds_the_most_likely_code_of_each_context():
    """
    7 7 3      after (left 7, up 7, up-left 7) comes 3, in two of three images
    7 7 ?
    """
    images = np.full((3, 9), 7)
    images[:, 2] = 3
    images[:, 4] = [3, 3, 5]
    table = D.count_table(images)
    left, up, corner, cell = (np.array([x]) for x in (7, 7, 7, 4))
    assert D.look_up(table, left, up, corner, cell) == [3]
    unseen = np.array([6])
    assert D.look_up(table, unseen, unseen, unseen, np.array([2])) == [3]
    on_device = D.Table(*map(jnp.asarray, table))
    contexts = [jnp.asarray(x) for x in (left, up, corner, cell)]
    assert D.look_up(on_device, *contexts) == 3
    # Wrong are the 5, and one of the cells 1 and 2, which have the same neighbours.
    assert D.measure_table(table, images) == pytest.approx(23 / 27)


def test_similar_places_of_an_image_are_copied():
    """
    1 2 3      there is already a 2 that is right of a 1 and below a 2
    1 2 9
    1 ? .
    """
    codes = np.array([[1, 2, 3, 1, 2, 9, 1, -1, -1]], np.int32)
    canvas = D.start_canvas(drafter("jacobi", 3), jnp.asarray(codes), 1, 9)
    canvas = canvas._replace(next_cell=jnp.array([7]))
    how = D.Drafter("jacobi", 3, (20, 30), 9)
    found = D.propose(how, None, None, None, canvas, jnp.array([7]))
    assert found.tolist() == [[22, 29]]
    sampled = canvas._replace(guesses=jnp.full((1, 9), -1).at[0, 7].set(25))
    found = D.propose(how, None, None, None, sampled, jnp.array([7]))
    assert found[0, 0] == 25


class Rows:
    """A memory of images, of which some may be shown."""

    def __init__(self, images):
        self.images, self.num_allowed, self.reads = images, len(images), 0

    def allowed_ids(self):
        return np.arange(self.num_allowed)

    def documents(self, ids):
        self.reads += 1
        return [
            TokenizedDocument(
                f"{i}",
                (
                    TokenizedSegment("text", np.zeros(2, np.int32)),
                    TokenizedSegment("image", VOCAB.image_tokens(self.images[i])),
                ),
            )
            for i in ids
        ]


def test_the_table_is_counted_once_over_what_may_be_shown():
    memory = Rows(np.tile(IMAGES[:2].astype(np.int32), (16, 1)))
    choice = draft_choice.DraftChoice()
    how, table = choice.choose("auto", memory, VOCAB, 1)
    assert how is not None and how.source == "table" and how.window > 1
    assert table is not None
    again = choice.choose("table", memory, VOCAB, 1)
    assert memory.reads == 1 and again[1] is table
    memory.num_allowed = 24
    choice.choose("auto", memory, VOCAB, 1)
    assert memory.reads == 2
    assert choice.choose("off", memory, VOCAB, 1) == (None, None)
    alone, none = choice.choose("auto", None, VOCAB, 1)
    assert alone is not None and alone.source == "jacobi" and none is None
    with pytest.raises(ValueError, match="draft='table' counts the images of a memory"):
        choice.choose("table", None, VOCAB, 1)


def test_hand_picked_documents_have_no_table():
    """Evaluations pick documents by hand; Jacobi's guesses need no table."""
    choice = draft_choice.DraftChoice()
    drafter, table = choice.choose("auto", object(), Vocab(64, 16, 16, 16), 1)
    assert drafter is not None and drafter.source == "jacobi" and table is None
    with pytest.raises(ValueError, match="has none"):
        choice.choose("table", object(), Vocab(64, 16, 16, 16), 1)


def test_guesses_that_save_no_time_are_dropped():
    choice = draft_choice.DraftChoice()
    sources = []
    for _ in range(3):
        how, _ = choice.choose("auto", Rows(np.tile(IMAGES[:1], (16, 1))), VOCAB, 1)
        sources.append(how and how.source)
        marks = np.full((1, 1), 1000)
        choice.note(
            types.SimpleNamespace(drafter=how, accepted=0 * marks, tested=marks)
        )  # pyright: ignore
    assert sources == ["table", "jacobi", None]


def test_programs_compiled_without_a_memory_guess_as_with_one(monkeypatch):
    monkeypatch.setattr(draft_choice, "current_platform", lambda: "gpu")
    chosen, _ = draft_choice.DraftChoice().choose("auto", None, VOCAB, 2)
    assert draft_choice.usual_drafter(VOCAB, 2, has_memory=False) == chosen
    usual = draft_choice.usual_drafter(VOCAB, 2)
    assert usual.source == "table" and usual.window >= chosen.window
    assert draft_choice.usual_drafter(VOCAB, 10_000) is None


@pytest.mark.parametrize(
    ("platform", "expected"),
    # On a CPU a second row costs nothing, and guidance already uses it.
    [("gpu", {1: 16, 20: 8, 500: 1}), ("cpu", {1: 2, 2: 1, 4: 1, 20: 1})],
)
def test_windows_shrink_with_rows_and_acceptance(monkeypatch, platform, expected):
    monkeypatch.setattr(draft_choice, "current_platform", lambda: platform)
    windows = {rows: draft_choice.choose_window(0.78, rows) for rows in expected}
    assert windows == expected
    assert draft_choice.choose_window(0.0, 1) == 1
    assert draft_choice.gain(0.5, 1, 7) == 1
