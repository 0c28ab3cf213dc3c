"""Emojiworld with synthetic icons: the join, the files, the scorers, the evaluation."""

from __future__ import annotations

import copy
import io
import json
import re
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from emojiworld import (
    captions,
    conditions,
    evaluate,
    features,
    fetch,
    figures,
    reconstruct,
    scorers,
    world,
)
from emojiworld.drawings import Drawings, read_drawings
from PIL import Image, ImageDraw

import racm3_jax
from racm3_jax import checkpoints
from racm3_jax.documents.images import resize_image
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval.embedder import DocumentEmbedder, DocumentEmbeddings
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.layout import document_tokens, retrieved_prefix
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer, compute_psnr
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import (
    Document,
    GenerationOutput,
    Retrieved,
    Segment,
    TokenizedDocument,
    TokenizedSegment,
)
from racm3_jax.vocab import Vocab

TRAIN = ("owl", "old key", "bus", "octopus", "gear", "hammer")
HELD_OUT = ("panda", "mount fuji", "violin", "rose")
SPLITS = {t: "train" for t in TRAIN} | {t: "held_out" for t in HELD_OUT}
THINGS = [*TRAIN, *HELD_OUT]
WITH_CHARS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
COLOURS = np.random.default_rng(5).integers(20, 220, (9, 3))


def pack(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            header = tarfile.TarInfo(f"package/{name}")
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def make_packages(folder):
    """Nine sets; some have code points, some names. Twemoji's owl is an alias."""
    packages = {}
    for vendor, icon_set in enumerate(world.SETS):
        bodies = {world.slug(t): f"<{t}/{vendor}>" for t in THINGS}
        chars = {}
        if icon_set.name in WITH_CHARS:
            # Names of its own, found by code points; the others take Noto's names.
            bodies = {f"icon-{k}": v for k, v in bodies.items()}
            chars = {
                f"1F9{i:02X}-FE0F": f"icon-{world.slug(t)}"
                for i, t in enumerate(THINGS)
            }
        elif icon_set.name == "fxemoji":
            del bodies["gear"]  # not drawn at all
            bodies["oldkey"] = bodies.pop("old-key")
        elif icon_set.name == "emojione":
            bodies["icon-violin"] = bodies.pop("violin")
        icons = {"icons": {k: {"body": v} for k, v in bodies.items()}, "width": 32}
        if icon_set.name == "twemoji":
            icons["icons"]["bird"] = icons["icons"].pop("icon-owl")
            icons["aliases"] = {"icon-owl": {"parent": "bird"}}
        path = folder / f"{icon_set.name}.tgz"
        files = {"chars.json": chars, "icons.json": icons}
        packages[icon_set.name] = pack(path, files)
    entries = [
        {"label": t, "hexcode": f"1F9{i:02X}", "group": 3} for i, t in enumerate(THINGS)
    ]
    entries.append({"label": "owl", "hexcode": "1F000", "group": 2})  # no thing
    packages["names"] = pack(
        folder / "names.tgz",
        {
            "en/data.json": entries,
            "meta/groups.json": {"groups": {"2": "component", "3": "objects"}},
        },
    )
    return packages


def rasterize(svg, side):
    """A pattern of the thing in the colour of the vendor, in a corner of the image."""
    thing, vendor = re.search(r"<([a-z ]+)/(\d)>", svg).groups()
    rng = np.random.default_rng(THINGS.index(thing))
    pattern = rng.random((8, 8)) < 0.5
    pattern[[0, -1]] = True
    cells = pattern.repeat(side // 16, 0).repeat(side // 16, 1)
    pixels = np.zeros((side, side, 4), np.uint8)
    corner = pixels[: len(cells), : len(cells)]
    corner[cells] = [*COLOURS[int(vendor)], 255]
    return pixels


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory):
    path = tmp_path_factory.mktemp("emojiworld")
    found = list(world.read_drawings(packages, SPLITS))
    assert fetch.write_world(found, path, 64, rasterize, shard_size=40) == len(found)
    return path


@pytest.fixture(scope="module")
def drawings(folder):
    return read_drawings(folder)


def test_the_lists_split_all_things():
    splits = world.read_split()
    sizes = [list(splits.values()).count(split) for split in world.SPLITS]
    assert sizes == [553, 100]
    assert splits["cactus"] == "held_out"


def test_icons_are_joined_by_code_point_alias_and_name(packages):
    found = list(world.read_drawings(packages, SPLITS))
    assert len(found) == 9 * len(THINGS) - 1  # the one gear
    by_key = {d.key: d for d in found}
    assert "<owl/2>" in by_key["twemoji-owl"].svg
    assert "<old key/8>" in by_key["fxemoji-old-key"].svg
    assert "<violin/6>" in by_key["emojione-violin"].svg
    assert by_key["noto-owl"].svg.count('viewBox="0 0 32 16"') == 1
    assert by_key["noto-panda"].split == "held_out"
    twins = [by_key[f"{name}-panda"] for name in ("fluent-emoji", "fluent-emoji-flat")]
    assert len({d.source for d in twins}) == 1
    assert len({d.source for d in found}) == 8 * len(THINGS) - 1
    with pytest.raises(ValueError, match="missing: griffin"):
        list(world.read_drawings(packages, SPLITS | {"griffin": "train"}))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("cactus", "a cactus"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("scissors", "scissors"),
        ("globe with meridians", "a globe with meridians"),
        ("mount fuji", "Mount Fuji"),
        ("bread", "bread"),
        ("two o’clock", "two o’clock"),
    ],
)
def test_things_have_their_article(thing, words):
    assert captions.with_article(thing) == words


def test_captions_name_thing_and_vendor_in_many_ways():
    found = captions.write_captions("cactus", "OpenMoji", "openmoji-cactus")
    assert len(set(found)) == len(captions.TEMPLATES)
    assert "a cactus in the style of OpenMoji" in found
    assert "an OpenMoji emoji of a cactus" in found
    firsts = {captions.write_captions("cactus", "X", f"k{i}")[0] for i in range(40)}
    assert len(firsts) == len(captions.TEMPLATES)
    assert all(captions.names_thing(c, "Cactus") for c in found)
    assert not captions.names_thing("a bearded man", "bear")
    assert not captions.names_thing("a cactus", "cactus flower")


def test_images_are_cropped_and_centred_on_white():
    pixels = fetch.render("<owl/0>", 64, rasterize)
    ink = np.argwhere((pixels < 250).any(-1))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert abs(ink.mean(0) - 31.5).max() < 2
    assert np.ptp(ink, 0).min() > 55  # the quarter of the image fills it
    assert fetch.render("", 64, lambda svg, side: np.zeros((side, side, 4))) is None


def test_the_files_are_read_by_the_projects_reader(folder, packages, tmp_path):
    found = list(racm3_jax.read_documents(f"webdataset:{folder}/held_out-*.tar"))
    assert len(found) == 9 * len(HELD_OUT)
    (one,) = [d for d in found if d.id.endswith("/openmoji-mount-fuji")]
    assert "Mount Fuji" in one.text and "OpenMoji" in one.text
    assert one.metadata["licence"] == "CC-BY-SA-4.0"
    assert one.metadata["thing"] == "mount fuji"
    assert one.metadata["house"] == one.metadata["icon_set"] == "openmoji"
    assert one.source == "emojiworld:openmoji/mount-fuji"
    assert one.text not in one.metadata["more_captions"]
    # Existing files are kept; missing ones are written again, byte for byte.
    again = list(world.read_drawings(packages, SPLITS))
    for name in ("settings.json", "train-00000.tar"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    rendered = []

    def count(svg, side):
        rendered.append(svg)
        return rasterize(svg, side)

    fetch.write_world(again, tmp_path, 64, count, shard_size=40)
    assert len(rendered) == len(again) - 40
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        fetch.write_world(again, tmp_path, 32, rasterize)


@pytest.fixture(scope="module")
def verdicts(drawings):
    return scorers.Verdicts.learn(drawings)


def test_scorers_identify_things_and_vendors(drawings, verdicts):
    held_out = drawings.split == "held_out"
    images = drawings.images[held_out]
    sets, things = drawings.icon_set[held_out], drawings.thing[held_out]
    real = verdicts.judge(list(images), sets.tolist(), things.tolist())
    for name in ("top1", "top5", "house3", "house5"):
        assert np.nanmean(real[name]) == 1
    requested = np.isin(sets, scorers.HOUSES_5)
    assert np.isnan(real["house5"]).tolist() == (~requested).tolist()
    # The same images with another requested thing, and with another vendor.
    others = [HELD_OUT[HELD_OUT.index(t) - 1] for t in things]
    wrong = verdicts.judge(list(images), sets.tolist(), others)
    assert wrong["top1"].mean() < 0.2
    own = np.flatnonzero(sets == "twemoji")
    as_other = ["openmoji"] * len(own)
    foreign = verdicts.judge(images[own], as_other, things[own].tolist())
    assert foreign["top1"].all() and not foreign["house3"].any()
    larger = images.repeat(2, 1).repeat(2, 2)
    assert (features.fit_pixels(list(larger)) == images).all()


def test_vendors_are_learned_from_reconstructions(drawings, verdicts):
    """With a tokenizer that changes colours, vendors learned from real images fail."""
    codec = types.SimpleNamespace(
        image_size=64, encode=lambda x: x[..., ::-1], decode=lambda x: x
    )
    figures = scorers.measure_scorers(verdicts, drawings, codec)
    assert figures["through the tokenizer"]["house5"] < 0.7
    learned = scorers.Verdicts.learn(drawings, codec)
    figures = scorers.measure_scorers(learned, drawings, codec)
    assert figures["through the tokenizer"]["house5"] == 1
    assert figures["real drawings"]["house5"] == 1


def test_fractions_count_things_not_images():
    things = ["a", "a", "b", "b", "c", "c"]
    outcomes = np.array([[1, 1, 0, 0, 1, np.nan]] * 3, float)
    share = figures.combine_outcomes(outcomes, things)
    assert (share.successes, share.total) == (9, 15)
    low, high = share.interval
    assert high - low > 0.6  # as of three questions, not of fifteen
    assert figures.combine_outcomes(np.full((1, 6), np.nan), things) is None
    better = {"top1": np.array([[1.0, 1, 1, 1, 0, 1]] * 2)}
    worse = {"top1": np.array([[0.0, 0, 0, 1, 0, 0]] * 2)}
    found = figures.compare_conditions({"retrieval": better}, worse, things)
    assert found["retrieval"]["top1"]["value"] == pytest.approx(2 / 3)
    ranks = figures.text_to_image_ranks(
        np.eye(3), np.array([[1, 0, 0], [2, 0, 1], [3, 1, 0]])
    )
    assert ranks.tolist() == [2, 1, 1]
    assert figures.saved_bits(np.ones(6), np.full(6, 2.0), things).value == 0.5


VOCAB = Vocab(num_text_ids=128, num_image_codes=256, image_length=64, num_sentinels=2)


class FakeTokenizer:
    """Tokens are characters; codes are the red of 8 x 8 positions."""

    vocab = VOCAB

    def __init__(self):
        self.image = types.SimpleNamespace(
            encode=self.encode,
            decode=self.decode_codes,
            fingerprint=self.fingerprint,
            image_size=64,
        )

    def fingerprint(self):
        return "fake"

    def encode(self, images):
        return images[:, 4::8, 4::8, 0].reshape(len(images), 64).astype(np.int32)

    def decode_codes(self, codes):
        grey = np.asarray(codes, np.uint8).reshape(-1, 8, 8, 1).repeat(3, 3)
        return grey.repeat(8, 1).repeat(8, 2)

    def fit_images(self, images):
        return images

    def tokenize(self, documents, batch=64):
        for d in documents:
            text = np.frombuffer(d.text.encode("ascii"), np.uint8).astype(np.int32)
            image = VOCAB.image_tokens(self.encode(np.stack(d.images))[0])
            segments = (
                TokenizedSegment("text", text),
                TokenizedSegment("image", image),
            )
            yield TokenizedDocument(d.id, segments, d.source, dict(d.metadata))

    def decode(self, document):
        text, image = (s.tokens for s in document.segments)
        pixels = self.decode_codes(VOCAB.image_codes(image)[None])[0]
        words = bytes(text.astype(np.uint8)).decode()
        return Document(document.id, (Segment(text=words), Segment(image=pixels)))


PATTERNS = np.stack(
    [fetch.render(f"<{t}/0>", 64, rasterize)[4::8, 4::8, 0] < 250 for t in THINGS]
)


class FakeEmbedder:
    """A text by the thing in it, an image by the most similar thing."""

    d_embed = 64
    config = types.SimpleNamespace(image_size=64)

    def fingerprint(self):
        return "fake"

    def embed_texts(self, texts, drop=0.0, rng=None):
        named = [[captions.names_thing(t, thing) for thing in THINGS] for t in texts]
        return self._unit(np.pad(np.array(named, float), ((0, 0), (0, 54))))

    def fit_images(self, images):
        return images

    def align(self, rows):
        return rows

    def embed_images(self, images, drop=0.0, rng=None):
        inked = np.stack(images)[:, None, 4::8, 4::8, 0] < 250
        alike = (inked == PATTERNS).mean((2, 3))
        best = alike == alike.max(1, keepdims=True)
        return self._unit(np.pad(best.astype(float), ((0, 0), (0, 54))))

    def embed_documents(self, documents):
        text = self.embed_texts([d.text for d in documents])
        image = self.embed_images([d.images[0] for d in documents])
        there = np.ones(len(documents), bool)
        return DocumentEmbeddings(text, image, text, there, there)

    @staticmethod
    def _unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class FakeGenerator:
    """Generates the image or text of its first document; retrieves like the real one."""

    def __init__(self, memory):
        self.retriever = Retriever(memory, StrategyConfig(max_similarity=2.0))
        self.embedder, self.tokenizer = FakeEmbedder(), FakeTokenizer()
        self.model = types.SimpleNamespace(config="fake")
        self.params = {"w": np.ones(3)}

    def with_retriever(self, retriever):
        other = copy.copy(self)
        other.retriever = retriever
        return other

    def retrieve_for(self, queries, num, documents):
        is_text = isinstance(queries[0], str)
        embed = self.embedder.embed_texts if is_text else self.embedder.embed_images
        nums = np.full(len(queries), num)
        if not num:
            none = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())
            return [none] * len(queries)
        return self.retriever.retrieve(embed(queries), nums, [None] * len(queries))

    def _outputs(self, prompts, found, seeds):
        for prompt, retrieved, seed in zip(prompts, found, seeds, strict=True):
            image = np.full((64, 64, 3), 200, np.uint8)
            words = "something"
            if retrieved.documents:
                first = self.tokenizer.decode(retrieved.documents[0])
                image, words = first.images[0], first.text
            segments = (Segment(text=words), Segment(image=image))
            document = Document("drawn", segments)
            yield GenerationOutput(
                [document], np.zeros(1, np.float32), retrieved, str(prompt), seed
            )

    def text_to_image_batch(self, prompts, *, num_retrieved, seed, **settings):
        found = self.retrieve_for(prompts, num_retrieved, None)
        return list(self._outputs(prompts, found, seed))

    def continue_batch(self, prompts, documents, *, seed, **settings):
        found = [
            Retrieved(np.full(len(d), -1), np.zeros(len(d), np.float32), tuple(d))
            for d in documents
        ]
        return list(self._outputs(prompts, found, seed))

    def caption_batch(
        self,
        images,
        *,
        num_retrieved,
        temperature,
        guidance,
        num_candidates,
    ):
        assert (temperature, guidance, num_candidates) == (0.0, 1.0, 0)
        found = self.retrieve_for(images, num_retrieved, None)
        return list(self._outputs([""] * len(images), found, range(len(images))))


def test_an_evaluation_excludes_the_vendors_own_images_and_resumes(
    drawings, folder, verdicts, tmp_path, monkeypatch
):
    memory = conditions.open_memory(
        drawings.documents,
        types.SimpleNamespace(tokenizer=FakeTokenizer(), embedder=FakeEmbedder()),
        tmp_path / "memory",
    )
    assert isinstance(memory, Memory)
    monkeypatch.setattr(evaluate, "open_generator", lambda *_: FakeGenerator(memory))
    monkeypatch.setattr(evaluate, "find_devices", lambda: (None,))
    learned = []

    def learn(*_):
        learned.append(1)
        return verdicts

    monkeypatch.setattr(scorers.Verdicts, "learn", learn)
    monkeypatch.setattr(
        conditions,
        "compute_likelihoods",
        lambda model, targets, num_retrieved: types.SimpleNamespace(
            sums=types.SimpleNamespace(
                image_nats=np.full(len(targets), 9.0 - num_retrieved)
            )
        ),
    )
    out = tmp_path / "out"
    flags = ["--data", str(folder), "--model", "m", "--out", str(out)]
    requested = "retrieval,oracle,no_documents,swapped,removed,copy"
    sizes = ["--chunk_size=20", f"--conditions={requested}"]
    evaluate.main([*flags, *sizes, "--seeds=1"])
    record = json.loads((out / "results.json").read_text())
    rows = record["figures"]
    # The first document shows the thing, by another vendor.
    ceiling = rows["copy"]["top1"]["value"]
    assert ceiling > 0.7
    for condition in ("retrieval", "oracle", "copy"):
        assert rows[condition]["top1"]["value"] == ceiling
        assert rows[condition]["shown"]["value"] == 1
    assert rows["swapped"]["followed"]["value"] == ceiling
    for condition in ("swapped", "removed", "no_documents"):
        assert rows[condition]["top1"]["value"] < 0.5
    assert rows["removed"]["shown"]["value"] == 0
    assert rows["retrieval"]["named"]["value"] == 1
    assert rows["no_documents"]["named"]["value"] == 0
    assert record["bits_saved"]["no_documents"]["value"] == pytest.approx(2 / 9)
    assert "baseline" not in rows
    clip = {name: share["value"] for name, share in record["clip"].items()}
    assert clip["text query, right thing first"] == 1
    assert clip["image query, right thing first"] == 1
    assert clip["text to image, recall at 1"] == 1  # ties are no misses
    # No image of the same vendor is shown, from any of its icon sets.
    targets = [d for d in drawings.documents if d.metadata["split"] == "held_out"]
    for chunk in range(2):
        found = np.load(out / "parts" / f"retrieval-seed1-{chunk:05d}.npz")["retrieved"]
        for target, shown in zip(targets[20 * chunk :], found, strict=False):
            assert all(d.source != target.source for d in memory.documents(shown))
    for name in ("samples.png", "memorised.png", "results.md"):
        assert (out / name).exists()
    # The scorers are kept, and their results on known images are below the table.
    assert record["scorers"]["real drawings"]["top1"] == 1
    assert "| through the tokenizer | " in (out / "results.md").read_text()
    kept, ceilings = scorers.open_verdicts(
        out / "scorers.npz", drawings, FakeTokenizer().image
    )
    assert ceilings == record["scorers"] and len(learned) == 1
    assert scorers.measure_scorers(kept, drawings)["real drawings"]["house5"] == 1
    other = FakeTokenizer().image
    other.fingerprint = lambda: "other"
    scorers.open_verdicts(out / "scorers.npz", drawings, other)
    assert len(learned) == 2
    # Only what is missing is generated; further seeds are added.
    times = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    (out / "parts" / "retrieval-seed1-00001.npz").unlink()
    fewer = [sizes[0], "--conditions=retrieval,copy", "--seeds=2"]
    evaluate.open_suite(evaluate.parse([*flags, *fewer])).run_stages()
    made = {
        p for p in (out / "parts").iterdir() if p.stat().st_mtime_ns != times.get(p)
    }
    assert {p.name.rpartition("-")[0] for p in made} == {
        "retrieval-seed1",
        "retrieval-seed2",
    }
    assert len(made) == 1 + 2


def test_a_tokenizer_is_measured_on_held_out_images(drawings, verdicts, monkeypatch):
    monkeypatch.setattr(scorers.Verdicts, "learn", lambda *_: verdicts)
    tokenizer = FakeTokenizer().image
    tokenizer.num_codes = 256
    found, decoded = reconstruct.measure_tokenizer(tokenizer, drawings)
    assert 5 < found["psnr"] < 30
    held_out = drawings.images[drawings.split == "held_out"]
    used = len(np.unique(held_out[:, 4::8, 4::8, 0]))
    assert found["codes_used"] == pytest.approx(used / 256)
    assert found["top1"] > found["house3"]  # it keeps no colour
    sheet = reconstruct.draw_pairs(drawings, decoded)
    assert sheet.shape[1] > 8 * 128


def test_wrong_input_is_refused_in_a_sentence(tmp_path, capsys):
    for arguments in (
        ["--data", str(tmp_path), "--model", "m", "--out", str(tmp_path)],
        ["--data", "x", "--model", "m", "--out", "x", "--conditions=drawn"],
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(arguments)
        assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "fetch.py --out=" in said and "choose from retrieval" in said


def test_images_need_their_metadata():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(KeyError, match="thing"):
        Drawings.of([Document("x", (Segment(image=image),))])


KEPT = Path(racm3_jax.__file__).parents[1] / "experiments/emojiworld/weights"


def draw_face():
    """A face of flat colours and thick lines, as emoji are: [1, 64, 64, 3]."""
    face = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(face)
    draw.ellipse((24, 24, 232, 232), (255, 200, 60), (40, 40, 40), 10)
    for left in (80, 146):
        draw.ellipse((left, 90, left + 30, 130), (40, 40, 40))
    draw.arc((80, 120, 176, 190), 20, 160, (160, 30, 40), 12)
    return np.asarray(face.resize((64, 64), Image.Resampling.LANCZOS))[None]


def test_the_kept_tokenizer_reconstructs_unseen_images():
    """The face has the same PSNR as the emoji."""
    tokenizer = ImageTokenizer.load(KEPT / "vqgan")
    images = draw_face()
    codes = tokenizer.encode(images)
    assert codes.shape == (1, 256) and tokenizer.num_codes == 1024
    assert compute_psnr(images, tokenizer.decode(codes))[0] > 24
    # Other codes give another image: the background does not dominate the PSNR.
    assert compute_psnr(images, tokenizer.decode(codes[:, ::-1]))[0] < 15


def test_the_kept_clip_finds_a_caption_by_another_of_its_thing():
    """Held-out things, in the words of two vendors."""
    embedder = DocumentEmbedder.load(KEPT / "clip")
    things = ("panda", "violin", "saxophone", "lemon", "crocodile", "cookie", "scroll")
    queries = embedder.embed_texts(
        [f"a {thing} in the style of Noto" for thing in things]
    )
    found = embedder.embed_texts(
        [f"an OpenMoji emoji of a {thing}" for thing in things]
    )
    assert (np.argmax(queries @ found.T, axis=1) == np.arange(len(things))).all()


def draw_sibling():
    """The same face as another vendor draws it: other colours, smaller, no outline."""
    face = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(face)
    draw.ellipse((40, 36, 216, 220), (240, 170, 90))
    for left in (90, 142):
        draw.ellipse((left, 96, left + 22, 124), (90, 50, 30))
    draw.arc((90, 120, 166, 184), 20, 160, (120, 20, 20), 8)
    return np.asarray(face.resize((64, 64), Image.Resampling.LANCZOS))[None]


def draw_tower():
    tower = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(tower)
    draw.polygon([(128, 10), (180, 246), (76, 246)], (60, 90, 160))
    draw.rectangle((30, 226, 226, 246), (40, 40, 40))
    return np.asarray(tower.resize((64, 64), Image.Resampling.LANCZOS))[None]


@pytest.mark.parametrize(("name", "side"), [("reading", 32), ("reading_64", 64)])
def test_the_kept_weights_read_another_drawing_of_the_same_thing(name, side):
    """Fewer nats of a face that they never saw, after a face than after a tower."""
    text = TextTokenizer.load(KEPT / "text" / "tokenizer.json")
    image = ImageTokenizer.load(KEPT / "vqgan").resized(side)
    tokenizer = MixedTokenizer(text, image, 16)
    params, fields, _ = checkpoints.load_weights(KEPT / name, "generator")
    config = checkpoints.build_config(ModelConfig, fields, KEPT / name)
    assert config.vocab_size == tokenizer.vocab.size
    assert config.image_positions and config.image_length == (side // 4) ** 2
    generator = Generator(config, params, tokenizer, None, None)
    drawn = {
        "a face in the style of Noto": draw_face(),
        "a face in the style of Twemoji": draw_sibling(),
        "a tower in the style of Twemoji": draw_tower(),
    }
    documents = [
        Document(
            text, (Segment(text=text), Segment(image=resize_image(images[0], side)))
        )
        for text, images in drawn.items()
    ]
    asked, right, wrong = tokenizer.tokenize(documents)
    vocab = tokenizer.vocab
    main = document_tokens(asked, vocab)
    start = len(main) - vocab.image_length
    shown = ([], [right], [wrong], [right, wrong], [wrong, right])
    nats = score_tokens(
        generator,
        [
            Scored(np.append(retrieved_prefix(s, vocab), main[:start]), main[start:])
            for s in shown
        ],
    )
    none, after_right, after_wrong, *both = (x.sum() for x in nats)
    assert after_right < none - 5
    assert after_right < after_wrong - 10
    assert max(both) < after_wrong - 10
