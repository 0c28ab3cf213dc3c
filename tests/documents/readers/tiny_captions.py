"""A TFDS builder with the features of `coco_captions`, three examples long."""

from __future__ import annotations

import io

import numpy as np
import tensorflow_datasets as tfds
from reader_files import jpeg


class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """Captions and images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "captions": tfds.features.Sequence(
                    {"id": np.int64, "text": tfds.features.Text()}
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"val": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield (
                i,
                {
                    "image": io.BytesIO(jpeg(i)),
                    "image/filename": f"{i}.jpg",
                    "image/id": i + 7,
                    "captions": [{"id": j, "text": f"{i} {j}"} for j in range(2)],
                },
            )
