"""What fits: bisection between compilations, and the messages of compilers."""

from __future__ import annotations

import pytest

from racm3_jax.compilation.figures import (
    Figures,
    find_largest,
    find_needed_bytes,
)
from racm3_jax.compilation.machines import find_machine
from racm3_jax.compilation.programs import Program
from racm3_jax.compilation.report import format_largest, suggest_smaller

CAPACITY = 1000.0


def search(first, max_compiles, *, per_unit=7.0, fixed=100.0, curve=0.0, silent=False):
    """The largest size for a program of `fixed + per_unit n + curve n^2` bytes."""
    compiled = []

    def compile_at(size):
        compiled.append(size)
        peak = fixed + per_unit * size + curve * size**2
        refused = "no room" if peak > CAPACITY else ""
        return Figures(size, (), 0.0 if silent and refused else peak, CAPACITY, refused)

    found = find_largest(compile_at, compile_at(first), 4, max_compiles, fixed)
    assert len(compiled) == len(set(compiled)) == len(found.tried) <= max_compiles
    assert all(size % 4 == 0 and size > 0 for size in compiled)
    return found


@pytest.mark.parametrize("first", [4, 64, 128, 132, 4000])
@pytest.mark.parametrize("curve", [0.0, 0.01, -0.0005])
@pytest.mark.parametrize("silent", [False, True])
def test_the_largest_size_is_found_from_any_start(first, curve, silent):
    found = search(first, 20, curve=curve, silent=silent)
    assert found.is_exact and found.too_large == found.fits + 4

    def peak(n):
        return 100 + 7 * n + curve * n * n

    assert peak(found.fits) <= CAPACITY < peak(found.too_large)


def test_a_line_needs_three_compilations():
    assert search(64, 3).fits == 128 and search(64, 3).is_exact
    assert len(search(64, 9).tried) == 3


def test_the_bound_on_compilations_holds():
    found = search(4, 2, curve=0.01)
    assert len(found.tried) == 2 and not found.is_exact
    assert search(4, 1).too_large is None


def test_nothing_fits():
    found = search(64, 20, fixed=2000.0)
    assert found.fits == 0 and found.too_large == 4 and found.is_exact


def program(name, unit):
    return Program(name, unit, 64, 4, lambda size: {})


def test_the_line_of_a_program():
    rows = program("train", "rows")
    assert format_largest(rows, search(64, 9)) == (
        "largest that fits: 128 rows (3 compilations)"
    )
    assert "and perhaps more" in format_largest(rows, search(4, 1))
    assert "no size that was compiled fits" in format_largest(
        rows, search(64, 9, fixed=2000.0)
    )


def test_suggested_changes():
    largest = search(64, 9)
    assert (
        "128 prompts fit" in suggest_smaller(program("decode", "prompts"), largest)[0]
    )
    assert "128 images fit" in suggest_smaller(program("embed", "images"), largest)[0]
    assert "fewer documents" in suggest_smaller(program("search", "documents"), None)[0]


def test_the_message_of_a_compiler_without_enough_memory():
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.5G of "
    assert find_needed_bytes(words + "15.75G hbm.") == 25.5 * 2**30
    words = "total memory required for HLO temporaries (16.00G) exceeds available HBM"
    assert find_needed_bytes(words + " (15.75G).") == 2**34
    assert find_needed_bytes("RESOURCE_EXHAUSTED: another reason") == 0


def test_a_machine_without_a_known_memory_fits_everything():
    assert find_machine("cpu", 2).platform == "cpu"
    assert Figures(4, (), 1e15, None).fits
    assert not Figures(4, (), 1e15, None, "no room").fits
