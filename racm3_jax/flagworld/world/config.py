"""The size and appearance of a flagworld."""

from __future__ import annotations

import dataclasses

from racm3_jax.limits import check_range

# Width and height in pixels of a 64x64 image; scaled with `image_size`. Multiples of 8,
# so that flags on the placement grid fill whole codes of a factor-8 image tokenizer; one
# is twice the other, so that each code of the large flag comes from one of the small.
FLAG_SIZES: tuple[tuple[int, int], ...] = ((24, 16), (48, 32))
REFERENCE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class FlagworldConfig:
    """One world, fully determined by these settings: equal configs give equal bytes.

    Attributes:
      seed: each seed gives another world.
      num_nations: nations of the training split.
      num_heldout: nations that are only in the memory and the test.
      documents_per_nation: training documents of each training nation.
      documents_per_heldout: memory documents of each held-out nation.
      image_size: height and width in pixels, a multiple of 8, at least 32.
      placement_grid: a flag's top left corner is a multiple of this many pixels; 8
        aligns flags with the codes of a factor-8 image tokenizer, 1 allows any
        position.
      flag_sizes: (width, height) choices, in pixels of a 64x64 image.
      wave_amplitudes: choices of vertical displacement, in pixels of a 64x64 image.
      wave_phases: choices of the wave's phase at the hoist, in half waves.
      pole: whether to draw a thin pole.
      num_colours: how many of `COLOURS` flags use (the first ones are the most
        different).
      num_reserved_scenes: scenes in which a held-out nation is never shown in the
        memory; the test uses exactly these.
      swap_flags: permute the flags of the held-out nations, so that no nation keeps its
        own; names, captions and placements do not change.
      description_share: fraction of the captions that also describe the flag: size,
        layout, colours and emblem. Without it a caption and its image share only the
        scene, and a CLIP has little to align.
      name_share: fraction of the captions that are only the nation's name: for the
        start of a curriculum.
      avoided_seed: seed of a world whose first `avoided_nations` nations, held-out ones
        first, share no name and no design with this one's. A model that was trained on
        that world has then seen none of these flags.
      avoided_nations: number of nations of that world to avoid; 0 avoids none.
      duplicate_share: fraction of documents followed by an exact copy (same `source`).
    """

    seed: int = 0
    num_nations: int = 4000
    num_heldout: int = 320
    documents_per_nation: int = 5
    documents_per_heldout: int = 8
    image_size: int = 64
    placement_grid: int = 8
    flag_sizes: tuple[tuple[int, int], ...] = FLAG_SIZES
    wave_amplitudes: tuple[float, ...] = (0.0, 1.0)
    wave_phases: tuple[int, ...] = (0,)
    pole: bool = True
    num_colours: int = 8
    num_reserved_scenes: int = 2
    swap_flags: bool = False
    duplicate_share: float = 0.0
    description_share: float = 0.0
    name_share: float = 0.0
    avoided_seed: int = 0
    avoided_nations: int = 0

    def __post_init__(self) -> None:
        counts = (
            "seed",
            "num_nations",
            "avoided_seed",
            "avoided_nations",
            "num_heldout",
        )
        check_range(self, "flagworld", *counts, low=0)
        sizes = ("documents_per_nation", "documents_per_heldout", "placement_grid")
        check_range(self, "flagworld", *sizes, "num_reserved_scenes", low=1)
        if self.image_size < 32 or self.image_size % 8:
            raise ValueError(
                "flagworld.image_size must be a multiple of 8, at least 32; got "
                f"{self.image_size}"
            )
        for name in ("flag_sizes", "wave_amplitudes", "wave_phases"):
            if not getattr(self, name):
                raise ValueError(f"flagworld.{name} needs at least one entry")
        if self.avoided_nations and self.avoided_seed == self.seed:
            raise ValueError(
                f"flagworld.avoided_seed is {self.avoided_seed}, this world's own seed: "
                "choose another flagworld.seed, or avoided_nations=0"
            )
        shares = ("duplicate_share", "description_share", "name_share")
        check_range(self, "flagworld", *shares, low=0, high=1)
        if self.swap_flags and self.num_heldout == 1:
            raise ValueError("flagworld.swap_flags needs num_heldout >= 2; got 1")
