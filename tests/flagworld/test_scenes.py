import itertools

import numpy as np
import pytest

from racm3_jax.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.flagworld.judge import SceneClassifier


def make_images(split, count, config):
    documents = list(itertools.islice(read_flagworld(config, split), count))
    return (
        np.stack([d.images[0] for d in documents]),
        [d.metadata["scene"] for d in documents],
    )


def test_scenes_of_unseen_nations_are_recognised():
    config = FlagworldConfig(num_nations=240, num_heldout=40)
    classifier = SceneClassifier(*make_images("train", 1200, config))
    images, scenes = make_images("heldout_memory", 200, config)
    found = classifier.classify(images)
    assert np.mean([a == b for a, b in zip(found, scenes, strict=True)]) >= 0.95


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        SceneClassifier(np.zeros((1, 40, 40, 3), np.uint8), ["sea"])
    with pytest.raises(ValueError, match="1 images but 2 scenes"):
        SceneClassifier(np.zeros((1, 64, 64, 3), np.uint8), ["sea", "moon"])
