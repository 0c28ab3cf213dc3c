"""Random weights with the names and shapes of pytorch-fid's file; and test images."""

import jax
import jax.numpy as jnp
import numpy as np

from racm3_jax.evaluation.inception import InceptionV3

SIZE = 107  # small, but every layer keeps at least one position


def random_weights(width: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """`{"Conv2d_1a_3x3.conv.weight": [out, in, height, width], "….bn.weight": …}`."""
    model = InceptionV3("fid", width)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))
    )
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in sorted(shapes["params"]):
        h, w, i, o = shapes["params"][name]["conv"]["kernel"].shape
        values = {
            "conv.weight": rng.normal(size=(o, i, h, w)) * (2 / (h * w * i)) ** 0.5,
            "bn.weight": rng.uniform(0.7, 1.3, o),
            "bn.bias": rng.normal(size=o) * 0.1,
            "bn.running_mean": rng.normal(size=o) * 0.1,
            "bn.running_var": rng.uniform(0.5, 1.5, o),
        }
        arrays |= {f"{name}.{k}": v.astype(np.float32) for k, v in values.items()}
    return arrays


def random_images(count: int, seed: int = 0, shift: int = 0) -> list[np.ndarray]:
    """Smooth images of several sizes, uint8."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        coarse = rng.integers(0, 256, (5, 6 + i % 3, 3)).astype(np.float64)
        fine = np.kron(coarse, np.ones((13, 11, 1))) + rng.normal(size=(1, 1, 3)) * 9
        images.append((fine + shift).clip(0, 255).astype(np.uint8))
    return images
