"""Collectives of compiled programs: their trips, their bytes and which are waited for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from racm3_jax import sharding
from racm3_jax.training.collectives import count_collectives, find_collectives

# A loop of 3 x 4 trips as the TPU's compiler writes it: no note of the trips, counters
# that start at a constant, one collective that is started, carried and finished.
TPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

%start (p.1: bf16[8,64]) -> (bf16[8,64], bf16[128,64]) {
  %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}
  ROOT %c.1 = (bf16[8,64]{1,0}, bf16[128,64]{1,0}) custom-call(%p.1, %all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: bf16[8,64]) -> bf16[128,64] {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}
}

%done (p.3: bf16[8,64]) -> bf16[128,64] {
  %p.3 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7, \
replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}
  ROOT %c.3 = bf16[128,64]{1,0} custom-call(%p.3, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%scatter (p.4: f32[64,64], p.5: s32[]) -> f32[4,64] {
  %p.4 = f32[64,64]{1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %all-reduce.1 = f32[64,64]{1,0} all-reduce(%p.4), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%sum
  ROOT %dynamic-slice.1 = f32[16,64]{1,0} dynamic-slice(%all-reduce.1, %p.5, %p.5)
}

%sum (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%l, %r)
}

%inner_body (t.1: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %x.1 = bf16[8,64]{1,0} get-tuple-element(%t.1), index=1
  %two = s32[] constant(2)
  %next.1 = s32[] add(%i.1, %two)
  %permute = (bf16[8,64]{1,0:T(8,128)}, bf16[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x.1), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %y.1 = bf16[8,64]{1,0} collective-permute-done(%permute)
  ROOT %tuple.1 = (s32[], bf16[8,64]{1,0}) tuple(%next.1, %y.1)
}

%inner_condition (t.2: (s32[], bf16[8,64])) -> pred[] {
  %t.2 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%t.2), index=0
  %eight = s32[] constant(8)
  ROOT %less.1 = pred[] compare(%i.2, %eight), direction=LT
}

%outer_body (t.3: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t.3 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%t.3), index=0
  %x.3 = bf16[8,64]{1,0} get-tuple-element(%t.3), index=1
  %one = s32[] constant(1)
  %zero = s32[] constant(0)
  %next.3 = s32[] add(%i.3, %one)
  %start.1 = (bf16[8,64]{1,0}, bf16[128,64]{1,0}) fusion(%x.3), kind=kCustom, \
calls=%start
  %carried = bf16[128,64]{1,0} fusion(%x.3), kind=kOutput, \
calls=%async_collective_fusion.1
  %done.1 = bf16[128,64]{1,0} fusion(%x.3), kind=kCustom, calls=%done
  %begin = (s32[], bf16[8,64]{1,0}) tuple(%zero, %x.3)
  %while.1 = (s32[], bf16[8,64]{1,0}) while(%begin), condition=%inner_condition, \
body=%inner_body
  %y.3 = bf16[8,64]{1,0} get-tuple-element(%while.1), index=1
  ROOT %tuple.3 = (s32[], bf16[8,64]{1,0}) tuple(%next.3, %y.3)
}

%outer_condition (t.4: (s32[], bf16[8,64])) -> pred[] {
  %t.4 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%t.4), index=0
  %three = s32[] constant(3)
  ROOT %less.2 = pred[] compare(%i.4, %three), direction=LT
}

ENTRY %main (x: bf16[8,64], w: f32[64,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = f32[64,64]{1,0} parameter(1)
  %begin.0 = s32[] constant(0)
  %reduced = f32[16,64]{1,0} fusion(%w, %begin.0), kind=kCustom, calls=%scatter
  %all = (f32[64]{0}, /*index=1*/f32[]) all-reduce(%a, %b), channel_id=10, \
replica_groups=[1,16]<=[16], to_apply=%sum
  %tuple.4 = (s32[], bf16[8,64]{1,0}) tuple(%begin.0, %x)
  %while.2 = (s32[], bf16[8,64]{1,0}) while(%tuple.4), condition=%outer_condition, \
body=%outer_body
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%while.2), index=1
}
"""

PROGRAM = """\
HloModule m, num_partitions=8

ENTRY %main (x: f32[4,8]) -> f32[] {{
  ROOT %y = {}
}}
"""


def test_a_tpu_program():
    traffic = count_collectives(TPU_PROGRAM)
    whole = 128 * 64 * 2
    gather, permute = traffic["all-gather"], traffic["collective-permute"]
    assert (gather.count, gather.asynchronous_count) == (3, 3)
    assert gather.bytes_on_wire == gather.asynchronous_bytes == 3 * whole * 15 / 16
    assert (permute.count, permute.asynchronous_count) == (12, 12)
    assert permute.bytes_on_wire == 12 * 8 * 64 * 2
    scatter, reduce = traffic["reduce-scatter"], traffic["all-reduce"]
    assert (scatter.count, scatter.asynchronous_count) == (1, 0)
    assert scatter.bytes_on_wire == 64 * 64 * 4 * 3 / 4
    assert reduce.bytes_on_wire == 2 * 65 * 4 * 15 / 16
    assert all(t.trips_known for t in traffic.values())


@pytest.mark.parametrize(
    ("line", "kind", "group", "whole", "asynchronous"),
    [
        (
            "(f32[4,8], f32[32,8]) all-gather-start(%x), replica_groups=[1,8]<=[8]",
            "all-gather", 8, 1024, True,
        ),
        (
            "((f32[32,8]), f32[4,8]) reduce-scatter-start(%x), replica_groups={}",
            "reduce-scatter", 8, 1024, True,
        ),
        (
            "f32[4,8] reduce-scatter(%x), replica_groups={{0,2,4,6},{1,3,5,7}}",
            "reduce-scatter", 4, 512, False,
        ),
        (
            'f32[4,8] all-reduce-start(%x), backend_config={"is_sync":true}',
            "all-reduce", 8, 128, False,
        ),
        (
            "s4[4,8] all-to-all(%x), replica_groups=mesh['a'=8] {'a':(2)4}",
            "all-to-all", 4, 16, False,
        ),
        (
            "f32[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a'}",
            "all-gather", 2, 32, False,
        ),
    ],
)  # fmt: skip
def test_one_operation(line, kind, group, whole, asynchronous):
    (found,) = find_collectives(PROGRAM.format(line))
    assert (found.kind, found.group_size, found.whole_bytes) == (kind, group, whole)
    assert found.asynchronous is asynchronous


@pytest.mark.parametrize(
    "line",
    [
        "f32[4,8] collective-permute(%x), source_target_pairs={{0,0},{1,1}}",
        "f32[4,8] all-reduce(%x), replica_groups={{0},{1}}",
        "f32[4,8] all-gather(%x), replica_groups=mesh['a'=8,'b'=1] {'b'}",
    ],
)
def test_other_operations_are_not_collectives(line):
    assert not find_collectives(PROGRAM.format(line))


@pytest.mark.parametrize("bound", ["known", "data"])
def test_a_compiled_loop(bound):
    """The sum over the split rows is one all-reduce per trip."""
    mesh = sharding.make_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def step(x, w):
        return w + jnp.tanh(x @ w).T @ x

    @functools.partial(jax.jit, in_shardings=(rows, None, None), out_shardings=None)
    def program(x, w, limit):
        if bound == "known":
            return jax.lax.scan(lambda w, _: (step(x, w), None), w, length=5)[0]
        return jax.lax.while_loop(lambda w: w.sum() < limit, lambda w: step(x, w), w)

    shapes = jnp.ones((16, 4)), jnp.ones((4, 4)), jnp.float32(9)
    text = program.lower(*shapes).compile().as_text()
    traffic = count_collectives(text)["all-reduce"]
    assert traffic.count == (5 if bound == "known" else 1)
    assert traffic.trips_known is (bound == "known")
    assert traffic.bytes_on_wire == traffic.count * 64 * 2 * 7 / 8


def test_a_text_that_is_not_a_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        count_collectives("module @jit_f {\n}\n")
