"""Communication of a compiled program: its collectives, with loop trips counted.

XLA's cost analysis counts the body of a loop once, so a gather in a loop over 32 layers
looks like one. This module parses the optimised program (`compiled.as_text()`): which
computation calls which, how often each loop runs, and how much each collective moves.

    traffic = count_collectives(compiled.as_text())
    traffic["all-gather"].count           executions in one run of the program
    traffic["all-gather"].bytes_on_wire   bytes that one device sends in one run
    sum(t.bytes_on_wire for t in traffic.values())
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Bytes that a device sends, for a whole array of 1 byte and a group of n (ring).
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      name: of the operation in the program's text.
      trips: how often it is executed in one run of the program.
      trips_known: False inside a loop whose trip count depends on data; such a loop
        counts once.
      group_size: number of participating devices.
      whole_bytes: size of the full array that is gathered or reduced.
      asynchronous: whether it can overlap with other work.
    """

    kind: str
    name: str
    trips: int
    trips_known: bool
    group_size: int
    whole_bytes: int
    asynchronous: bool

    @property
    def bytes_on_wire(self) -> float:
        """Bytes that one device sends in all trips, by the ring algorithm."""
        return self.trips * self.whole_bytes * _SENT[self.kind](self.group_size)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind, for one device and one run of the program.

    Attributes:
      count: executions, with loop trips counted.
      bytes_on_wire: bytes that one device sends, by the ring algorithm.
      asynchronous_count: those of `count` that can overlap with other work.
      asynchronous_bytes: the same for `bytes_on_wire`.
      trips_known: False if some are in a loop whose trip count depends on data.
    """

    count: int
    bytes_on_wire: float
    asynchronous_count: int
    asynchronous_bytes: float
    trips_known: bool


def count_collectives(program: str) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind; absent kinds are omitted.

    Args:
      program: `compiled.as_text()` of `jax.jit(f).lower(...).compile()`.
    """
    by_kind = collections.defaultdict(list)
    for collective in find_collectives(program):
        by_kind[collective.kind].append(collective)
    return {
        kind: Traffic(
            count=sum(c.trips for c in found),
            bytes_on_wire=sum(c.bytes_on_wire for c in found),
            asynchronous_count=sum(c.trips for c in found if c.asynchronous),
            asynchronous_bytes=sum(c.bytes_on_wire for c in found if c.asynchronous),
            trips_known=all(c.trips_known for c in found),
        )
        for kind, found in sorted(by_kind.items())
    }


def find_collectives(program: str) -> list[Collective]:
    """Every collective operation that a run of a compiled program executes.

    Collectives over groups of one device (from mesh axes of size 1) are ignored.

    Three forms are recognised: one operation; a pair `...-start` and `...-done`; and
    TPU fusions, where one collective is started, passed through the fusions that
    overlap with it, and finished, all under the same channel number.

    Args:
      program: see `count_collectives`.
    """
    module = _parse(program)
    found: list[Collective] = []
    fused: dict[tuple[str, str, str], int] = {}
    for call in _walk(module, module.entry, _Call(1, True, "", False)):
        for operation in module.computations[call.computation].values():
            kind = operation.kind
            if kind is None or operation.is_done:
                continue
            collective = _read(module, call, operation, kind)
            if collective.group_size == 1:
                continue
            channel = _find(r"channel_id=(\d+)", operation.attributes)
            if not call.fused_by or channel is None:
                found.append(collective)
                continue
            key = (call.fused_by, collective.kind, channel)
            if key not in fused:
                fused[key] = len(found)
                found.append(collective)
            elif collective.asynchronous:
                found[fused[key]] = collective
    return found


@dataclasses.dataclass(frozen=True)
class _Operation:
    """`name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def kind(self) -> str | None:
        """Which collective it is; None if it is not one."""
        name = self.opcode.removesuffix("-start").removesuffix("-done")
        return name if name in KINDS else None

    @property
    def is_done(self) -> bool:
        return self.opcode.endswith("-done")

    @property
    def operand_names(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)


@dataclasses.dataclass(frozen=True)
class _Module:
    """Operations by computation and name; the entry; devices of the program."""

    computations: dict[str, dict[str, _Operation]]
    entry: str
    num_devices: int

    def root(self, computation: str) -> _Operation:
        return next(o for o in self.computations[computation].values() if o.is_root)


@dataclasses.dataclass(frozen=True)
class _Call:
    """How a computation is reached: trip count, and the computation it is fused into."""

    trips: int
    trips_known: bool
    fused_by: str
    asynchronous: bool
    computation: str = ""


def _parse(program: str) -> _Module:
    computations: dict[str, dict[str, _Operation]] = {}
    entry, current = "", {}
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if header and not line.startswith(("HloModule", " ")):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (operation := _parse_operation(line)) is not None:
            current[operation.name] = operation
    if not entry:
        raise ValueError(
            "this is not a compiled program (no ENTRY computation): pass the result of "
            "compiled.as_text()"
        )
    sizes = [
        int(_find(rf"{name}=(\d+)", program.split("\n", 1)[0]) or 1)
        for name in ("replica_count", "num_partitions")
    ]
    return _Module(computations, entry, math.prod(sizes))


def _parse_operation(line: str) -> _Operation | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].partition("(")
    opened = end + len(opcode)
    closed = _closing(rest, opened)
    return _Operation(
        name=start[2],
        type=rest[:end],
        opcode=opcode.strip(),
        operands=rest[opened + 1 : closed],
        attributes=rest[closed + 1 :],
        is_root=start[1] is not None,
    )


def _closing(text: str, opened: int) -> int:
    """Index of the parenthesis that closes the one at `opened`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _find(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _walk(module: _Module, computation: str, call: _Call) -> Iterator[_Call]:
    """Every computation that runs, once for each operation that calls it."""
    yield dataclasses.replace(call, computation=computation)
    for operation in module.computations[computation].values():
        if operation.is_done or operation.opcode == "async-update":
            continue
        inner = call
        if operation.opcode == "while":
            body = _find(r"body=%?([\w.\-]+)", operation.attributes)
            assert body is not None
            trips = _count_trips(module, computation, operation, body)
            inner = dataclasses.replace(
                call,
                trips=call.trips * (1 if trips is None else trips),
                trips_known=call.trips_known and trips is not None,
                fused_by="",
            )
            yield from _walk(module, body, inner)
            continue
        if operation.opcode == "fusion":
            inner = dataclasses.replace(call, fused_by=call.fused_by or computation)
        elif operation.opcode == "async-start":
            inner = dataclasses.replace(call, asynchronous=True)
        for called in _called(operation):
            yield from _walk(module, called, inner)


def _called(operation: _Operation) -> list[str]:
    if operation.opcode not in ("fusion", "call", "async-start", "conditional"):
        return []  # the reduction's scalar function
    lists = re.findall(
        r"(?:calls|to_apply|branch_computations|true_computation|false_computation)="
        r"(\{[^}]*\}|%?[\w.\-]+)",
        operation.attributes,
    )
    return [name for one in lists for name in re.findall(r"[\w.\-]+", one)]


def _count_trips(
    module: _Module, caller: str, loop: _Operation, body: str
) -> int | None:
    """Trip count of a loop, from the compiler's annotation or its counter; else None.

    A counter is an element of the loop's tuple that starts at a constant, is
    incremented by a constant, and is compared with a constant in the condition.
    """
    known = _find(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known is not None:
        return int(known)
    condition = _find(r"condition=%?([\w.\-]+)", loop.attributes)
    assert condition is not None
    test = module.root(condition)
    direction = _find(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction not in ("LT", "LE"):
        return None
    left, right = (
        module.computations[condition].get(name) for name in test.operand_names
    )
    bound = _constant(module, condition, right)
    if left is None or bound is None or left.opcode != "get-tuple-element":
        return None
    index = int(_find(r"index=(\d+)", left.attributes) or -1)
    begin = _element(module, caller, loop.operand_names[0], index)
    after = _element(module, body, module.root(body).name, index)
    first = _constant(module, caller, begin)
    step = _increment(module, body, after, index)
    if first is None or step is None or step < 1:
        return None
    return max(0, math.ceil((bound + (direction == "LE") - first) / step))


def _element(
    module: _Module, computation: str, name: str, index: int
) -> _Operation | None:
    operations = module.computations[computation]
    made = operations.get(name)
    if made is None or made.opcode != "tuple":
        return None
    return operations.get(made.operand_names[index])


def _constant(
    module: _Module, computation: str, operation: _Operation | None
) -> int | None:
    """The integer constant behind an operation, through copies; None if not constant."""
    operations = module.computations[computation]
    while operation is not None and operation.opcode in ("copy", "bitcast"):
        operation = operations.get(operation.operand_names[0])
    if operation is None or operation.opcode != "constant":
        return None
    value = operation.operands.strip()
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _increment(
    module: _Module, computation: str, operation: _Operation | None, index: int
) -> int | None:
    """What a body adds to element `index` of its tuple."""
    operations = module.computations[computation]
    while operation is not None and operation.opcode in ("copy", "bitcast"):
        operation = operations.get(operation.operand_names[0])
    if operation is None:
        return None
    if operation.opcode == "get-tuple-element":  # not changed
        return 0 if _find(r"index=(\d+)", operation.attributes) == str(index) else None
    if operation.opcode == "fusion":
        called = _called(operation)[0]
        inner = module.root(called)
        if inner.opcode != "add":
            return None
        values = [module.computations[called].get(n) for n in inner.operand_names]
        outer = [operations.get(name) for name in operation.operand_names]
        values = [
            outer[int(v.operands)] if v is not None and v.opcode == "parameter" else v
            for v in values
        ]
        steps = [
            _constant(module, where, v)
            for v in values
            for where in (called, computation)
            if v is not None and v.name in module.computations[where]
        ]
        return next((step for step in steps if step is not None), None)
    if operation.opcode != "add":
        return None
    pair = [operations.get(name) for name in operation.operand_names]
    for one, other in (pair, pair[::-1]):
        step = _constant(module, computation, other)
        before = _increment(module, computation, one, index)
        if step is not None and before is not None:
            return step + before
    return None


def _read(module: _Module, call: _Call, operation: _Operation, kind: str) -> Collective:
    group = _group_size(operation.attributes, module.num_devices)
    whole = _whole_bytes(operation, kind, group)
    siblings = module.computations[call.computation].values()
    if call.fused_by and kind == "all-reduce" and _keeps_a_slice(siblings):
        kind = "reduce-scatter"  # the TPU's form of it
    asynchronous = (
        call.asynchronous
        or operation.opcode.endswith("-start")
        or any("AsyncCollectiveStart" in o.attributes for o in siblings)
    )
    if re.search(r'"is_sync":\s*true', operation.attributes):
        asynchronous = False
    return Collective(
        kind=kind,
        name=operation.name,
        trips=call.trips,
        trips_known=call.trips_known,
        group_size=group,
        whole_bytes=whole,
        asynchronous=asynchronous,
    )


def _keeps_a_slice(operations: Iterable[_Operation]) -> bool:
    return any(operation.opcode == "dynamic-slice" for operation in operations)


_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


def _type_bytes(text: str) -> list[int]:
    """Bytes of every array in a type, in order."""
    sizes = []
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", text):
        bits = _BITS.get(dtype, int(_find(r"^[a-z](\d+)", dtype) or 8))
        count = math.prod(int(n) for n in re.findall(r"\d+", shape))
        sizes.append(math.ceil(count * bits / 8))
    return sizes


def _whole_bytes(operation: _Operation, kind: str, group: int) -> int:
    """Bytes of the array that is gathered, reduced, exchanged or passed on."""
    is_start = operation.opcode.endswith("-start")
    text = operation.type
    if is_start:  # the runtime's own context comes last
        text = re.sub(r",\s*(/\*.*?\*/)?[us]32\[\](\{[^}]*\})?(?=[,)])", "", text)
    total = sum(_type_bytes(text))
    if not is_start or kind == "all-reduce":
        return total * group if kind == "reduce-scatter" else total
    # A start returns operands and results.
    if kind in ("all-gather", "reduce-scatter"):
        return round(total * group / (group + 1))
    return total // 2


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices of one group, in any of the forms in which XLA writes groups.

    ```
    replica_groups={{0,1},{2,3}}                  2
    replica_groups=[2,4]<=[8]                     4
    replica_groups=mesh['a'=2,'b'=4] {'b'}        4
    replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}    2
    replica_groups={}                             all devices
    source_target_pairs={{0,1},{1,0}}             2; 1 if each device keeps its own
    ```
    """
    pairs = _find(r"source_target_pairs=\{(.*?)\}\}?,", attributes + "},")
    if pairs is not None:
        ends = re.findall(r"(\d+),(\d+)", pairs)
        return 2 if any(source != target for source, target in ends) else 1
    mesh = re.search(
        r"replica_groups=@?mesh\w*\[(.*?)\](?:, device_ids=[^{]*)?\s*\{(.*?)\}",
        attributes,
    )
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        total = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]):
            total *= int(part or sizes[axis])
        return total
    iota = _find(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota is not None:
        return int(iota)
    listed = _find(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed.split(",")) if listed else num_devices
