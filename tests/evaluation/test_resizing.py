import numpy as np
import pytest
from PIL import Image

from racm3_jax.evaluation.resizing import resize_batch


def make_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_clean_is_pils_bicubic_in_float():
    image = make_image(31, 47)
    found = resize_batch([image], 19)[0]
    for c in range(3):
        channel = Image.fromarray(image[..., c].astype(np.float32))
        wanted = np.asarray(channel.resize((19, 19), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(found[..., c], wanted.clip(0, 255))
    # and on the way up, where the bicubic filter overshoots
    up = resize_batch(
        [
            np.kron(np.eye(4), np.ones((2, 2)))[..., None].repeat(3, 2).astype(np.uint8)
            * 255
        ],
        21,
    )
    assert up.min() == 0 and up.max() == 255


def test_legacy_reads_four_pixels_only():
    # 4 -> 2: each output is the mean of the 2x2 pixels at its centre
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, 2)
    found = resize_batch([image], 2, "legacy")[0, ..., 0]
    np.testing.assert_allclose(found, [[2.5, 4.5], [10.5, 12.5]])
    # 8 -> 2: still only the two nearest, so detail aliases; clean averages it away
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::4] = 255
    assert resize_batch([stripes], 2, "legacy").max() == 0
    assert resize_batch([stripes], 2, "clean").max() > 30


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'clean', 'legacy'"):
        resize_batch([make_image(4, 4)], 2, "bilinear")  # pyright: ignore


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_legacy_live():
    torch = pytest.importorskip("torch")
    for shape in ((31, 47), (12, 9), (299, 299)):
        image = make_image(*shape)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        wanted = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear")
        found = resize_batch([image], 299, "legacy")[0]
        np.testing.assert_allclose(found, wanted[0].permute(1, 2, 0).numpy(), atol=2e-3)
