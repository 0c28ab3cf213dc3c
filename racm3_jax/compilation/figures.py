"""Compiles a program and reads its figures: bytes, communication, what fits."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from racm3_jax.compilation.machines import Machine, absent_cudnn
from racm3_jax.compilation.programs import Program
from racm3_jax.training.collectives import Traffic, count_collectives

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PartFigures:
    """One compiled part of a program; bytes and communication are per device.

    Attributes:
      name: of the part.
      seconds: of tracing and compiling.
      arguments: bytes of the inputs.
      temporaries: bytes of temporary buffers.
      outputs: bytes of outputs that are not aliased to inputs.
      code: bytes of the program itself.
      traffic: collectives by kind, in one run.
    """

    name: str
    seconds: float
    arguments: int
    temporaries: int
    outputs: int
    code: int
    traffic: Mapping[str, Traffic]

    @property
    def peak(self) -> int:
        """Peak bytes of the part."""
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def bytes_on_wire(self) -> float:
        """Bytes that one device sends in one run, over all collectives."""
        return sum(traffic.bytes_on_wire for traffic in self.traffic.values())


@dataclasses.dataclass(frozen=True)
class Figures:
    """A program compiled at one size.

    Attributes:
      size: see `Program`.
      parts: the compiled parts; fewer if one does not fit.
      peak: bytes of the largest part, or the bytes that the compiler would need.
      capacity: bytes that a program may use on one device; None if unknown.
      refused: the compiler's message if it does not fit, else "".
    """

    size: int
    parts: tuple[PartFigures, ...]
    peak: float
    capacity: float | None
    refused: str = ""

    @property
    def fits(self) -> bool:
        return not self.refused and (
            self.capacity is None or self.peak <= self.capacity
        )

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)


Watch = Callable[[str], contextlib.AbstractContextManager[Any]]
"""`with watch("what is compiled"): ...` shows progress."""


@contextlib.contextmanager
def unwatched(text: str) -> Iterator[None]:
    """A `Watch` that shows nothing."""
    del text
    yield


def compile_program(
    program: Program,
    machine: Machine,
    size: int,
    capacity: float | None,
    watch: Watch = unwatched,
) -> tuple[Figures, dict[str, jax.stages.Compiled]]:
    """Compiles every part of a program at one size.

    Args:
      program: from `build_program`.
      machine: whose devices the program was built for.
      size: see `Program`.
      capacity: bytes that a program may use on one device, if known.
      watch: shows progress.

    Returns:
      The figures, and the compiled parts by name.
    """
    parts: list[PartFigures] = []
    compiled: dict[str, jax.stages.Compiled] = {}
    count = f"{size:,} {program.unit}"
    started = time.monotonic()
    with watch(f"{machine}: trace {program.name}, {count}"), absent_cudnn(machine):
        traced = program.trace(size)
        lowered = {name: part.lower() for name, part in traced.items()}
    tracing = (time.monotonic() - started) / len(lowered)
    for name, part in lowered.items():
        started = time.monotonic()
        try:
            with watch(f"{machine}: compile {name}, {count}"):
                made = part.compile()
        except jax.errors.JaxRuntimeError as error:
            words = " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in words:
                raise
            needed = find_needed_bytes(words)
            return (
                Figures(size, tuple(parts), needed, capacity, words[:400]),
                compiled,
            )
        compiled[name] = made
        seconds = tracing + time.monotonic() - started
        parts.append(read_figures(name, made, seconds))
    peak = max(part.peak for part in parts)
    return Figures(size, tuple(parts), peak, capacity), compiled


def read_figures(name: str, compiled: Any, seconds: float) -> PartFigures:
    """The compiler's figures of one compiled program."""
    memory = compiled.memory_analysis()
    return PartFigures(
        name=name,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=count_collectives(compiled.as_text()),
    )


def find_needed_bytes(words: str) -> float:
    """Bytes that a compiler that ran out of memory would need; 0 if unknown.

    "Used 25.06G of 15.75G hbm" is in units of 2**30 bytes, as is "temporaries (16.00G)
    exceeds available", where temporaries alone are too large.
    """
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", words)
    if match is None:
        return 0.0
    return float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest size that fits, as far as tried.

    Attributes:
      fits: the largest size that was compiled and fits; 0 if none did.
      too_large: the smallest size that was compiled and does not; None if all fit.
      step: sizes are multiples of it.
      tried: the compiled sizes, in order.
    """

    fits: int
    too_large: int | None
    step: int
    tried: tuple[Figures, ...]

    @property
    def is_exact(self) -> bool:
        """Whether no size between the two remains."""
        return self.too_large is not None and self.too_large - self.fits <= self.step


def find_largest(
    compile_at: Callable[[int], Figures],
    first: Figures,
    step: int,
    max_compiles: int,
    fixed_bytes: float,
) -> Largest:
    """The largest size that fits, by a bounded number of compilations.

    Bytes grow almost linearly with the size: the next size is where that line meets the
    capacity, limited to the open interval.

    Args:
      compile_at: size -> its figures.
      first: of a size that was compiled already.
      step: sizes are multiples of it.
      max_compiles: maximum number of compilations, including the first.
      fixed_bytes: approximate bytes at size 0 (weights, optimizer state).
    """
    tried = [first]

    def border() -> tuple[int, int | None]:
        """Largest that fits and smallest that does not, in steps."""
        fitting = [figures.size // step for figures in tried if figures.fits]
        others = [figures.size // step for figures in tried if not figures.fits]
        return max(fitting, default=0), min(others, default=None)

    while len(tried) < max_compiles and first.capacity is not None:
        low, high = border()
        if high is not None and high - low <= 1:
            break
        guess = _meet(tried, fixed_bytes, first.capacity) // step
        if high is None:
            guess = max(low + 1, guess)
        else:
            guess = min(max(guess, low + 1), high - 1)
        tried.append(compile_at(guess * step))
    low, high = border()
    return Largest(
        low * step, None if high is None else high * step, step, tuple(tried)
    )


def _meet(tried: list[Figures], fixed_bytes: float, capacity: float) -> int:
    """The size at which a line through the tried sizes reaches the capacity."""
    known = sorted((f.size, f.peak) for f in tried if f.peak)
    if not known:  # no compiler reported its needs
        return min(f.size for f in tried) // 2
    # The two points around the capacity, or next to it; the fixed bytes are another
    # one.
    known = [(0, min(fixed_bytes, known[0][1])), *known]
    above = next((i for i, (_, peak) in enumerate(known) if peak > capacity), None)
    end = len(known) - 1 if above is None else max(above, 1)
    (size_0, peak_0), (size_1, peak_1) = known[end - 1], known[end]
    slope = (peak_1 - peak_0) / max(size_1 - size_0, 1)
    if slope <= 0:
        return 2 * size_1
    return int(size_0 + (capacity - peak_0) / slope)
