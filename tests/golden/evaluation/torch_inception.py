"""Inception-v3 as pytorch-fid and torchvision define it, in torch, for comparisons.

Only what determines the features is here: kernel sizes, strides, padding, the order of the
branches, and the two kinds of average. Run this file to make inception.npz:

    PYTHONPATH=. python tests/golden/evaluation/torch_inception.py
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from inception_weights import SIZE, random_images, random_weights

WIDTH = 16


class Unit(nn.Module):
    def __init__(self, i, o, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """A block from a table: branch -> list of (name, channels, kernel, stride, padding)."""

    def __init__(self, i, width, branches, pooling, pooled=0, fans=()):
        super().__init__()
        self.branches, self.pooling, self.fans = branches, pooling, dict(fans)
        self.out = 0
        for branch in branches:
            c = i
            for name, o, kernel, stride, padding in branch:
                setattr(self, name, Unit(c, o // width, kernel, stride, padding))
                c = o // width
            if branch and branch[-1][0] in self.fans:
                for fan, kernel, padding in self.fans[branch[-1][0]]:
                    setattr(self, fan, Unit(c, 384 // width, kernel, 1, padding))
                    self.out += 384 // width
            else:
                self.out += c
        if pooled:
            self.branch_pool = Unit(i, pooled // width, 1)
            self.out += pooled // width
        else:
            self.out += i

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = x
            for name, *_ in branch:
                y = getattr(self, name)(y)
            if branch[-1][0] in self.fans:
                outputs += [getattr(self, f)(y) for f, *_ in self.fans[branch[-1][0]]]
            else:
                outputs.append(y)
        if self.pooling == "shrink":
            outputs.append(functional.max_pool2d(x, 3, 2))
            return torch.cat(outputs, 1)
        if self.pooling == "max":
            y = functional.max_pool2d(x, 3, 1, 1)
        else:
            padded = self.pooling == "average with padding"
            y = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=padded)
        return torch.cat([*outputs, self.branch_pool(y)], 1)


def square(i, width, pooling, pooled):
    one = [("branch1x1", 64, 1, 1, 0)]
    five = [("branch5x5_1", 48, 1, 1, 0), ("branch5x5_2", 64, 5, 1, 2)]
    three = [(f"branch3x3dbl_{n}", c, k, 1, k // 2) for n, c, k in
             ((1, 64, 1), (2, 96, 3), (3, 96, 3))]  # fmt: skip
    return Block(i, width, [one, five, three], pooling, pooled)


def factored(i, width, pooling, c):
    a, b = ((1, 7), (0, 3)), ((7, 1), (3, 0))
    one = [("branch1x1", 192, 1, 1, 0)]
    seven = [("branch7x7_1", c, 1, 1, 0), ("branch7x7_2", c, a[0], 1, a[1]),
             ("branch7x7_3", 192, b[0], 1, b[1])]  # fmt: skip
    double = [("branch7x7dbl_1", c, 1, 1, 0), ("branch7x7dbl_2", c, b[0], 1, b[1]),
              ("branch7x7dbl_3", c, a[0], 1, a[1]), ("branch7x7dbl_4", c, b[0], 1, b[1]),
              ("branch7x7dbl_5", 192, a[0], 1, a[1])]  # fmt: skip
    return Block(i, width, [one, seven, double], pooling, 192)


def fanned(i, width, pooling):
    one = [("branch1x1", 320, 1, 1, 0)]
    three = [("branch3x3_1", 384, 1, 1, 0)]
    double = [("branch3x3dbl_1", 448, 1, 1, 0), ("branch3x3dbl_2", 384, 3, 1, 1)]
    fans = {
        "branch3x3_1": [("branch3x3_2a", (1, 3), (0, 1)),
                        ("branch3x3_2b", (3, 1), (1, 0))],
        "branch3x3dbl_2": [("branch3x3dbl_3a", (1, 3), (0, 1)),
                           ("branch3x3dbl_3b", (3, 1), (1, 0))],
    }  # fmt: skip
    return Block(i, width, [one, three, double], pooling, 192, fans)


class Trunk(nn.Module):
    def __init__(self, variant="fid", width=1):
        super().__init__()
        average = "average" + (" with padding" if variant == "torchvision" else "")
        c = [n // width for n in (32, 32, 64, 80, 192)]
        self.Conv2d_1a_3x3 = Unit(3, c[0], 3, 2)
        self.Conv2d_2a_3x3 = Unit(c[0], c[1], 3)
        self.Conv2d_2b_3x3 = Unit(c[1], c[2], 3, 1, 1)
        self.Conv2d_3b_1x1 = Unit(c[2], c[3], 1)
        self.Conv2d_4a_3x3 = Unit(c[3], c[4], 3)
        i = c[4]
        self.order = []

        def add(name, block):
            setattr(self, name, block)
            self.order.append(name)
            return block.out

        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            i = add(f"Mixed_{name}", square(i, width, average, pooled))
        i = add("Mixed_6a", Block(i, width, [
            [("branch3x3", 384, 3, 2, 0)],
            [("branch3x3dbl_1", 64, 1, 1, 0), ("branch3x3dbl_2", 96, 3, 1, 1),
             ("branch3x3dbl_3", 96, 3, 2, 0)],
        ], "shrink"))  # fmt: skip
        for name, wide in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            i = add(f"Mixed_{name}", factored(i, width, average, wide))
        i = add("Mixed_7a", Block(i, width, [
            [("branch3x3_1", 192, 1, 1, 0), ("branch3x3_2", 320, 3, 2, 0)],
            [("branch7x7x3_1", 192, 1, 1, 0), ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
             ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)), ("branch7x7x3_4", 192, 3, 2, 0)],
        ], "shrink"))  # fmt: skip
        i = add("Mixed_7b", fanned(i, width, average))
        add("Mixed_7c", fanned(i, width, "max" if variant == "fid" else average))

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, 2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in self.order:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def reference_features(images, variant, width, size, seed=0):
    """Features of uint8 images, resized as pytorch-fid's network does ("legacy")."""
    torch.set_num_threads(1)
    arrays = random_weights(width, seed)
    model = Trunk(variant, width).eval()
    state = {k: torch.from_numpy(v) for k, v in arrays.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all("num_batches_tracked" in k for k in found.missing_keys)
    rows = []
    with torch.no_grad():
        for image in images:
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            x = functional.interpolate(x, (size, size), mode="bilinear")
            if variant == "fid":
                x = 2 * x - 1
            else:
                mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
                x = (x - mean) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
            rows.append(model(x)[0].numpy())
    return np.stack(rows)


def main():
    images = random_images(2)
    path = pathlib.Path(__file__).parent / "inception.npz"
    np.savez(
        path,
        **{
            v: reference_features(images, v, WIDTH, SIZE)
            for v in ("fid", "torchvision")
        },
    )
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
