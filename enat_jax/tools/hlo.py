"""Counts what a compiled program does, read from its HLO text: FLOPs, traffic, memory."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from enat_jax.tools.hlo_products import product_flops
from enat_jax.tools.hlo_text import Computation, Instruction, Module, Shape, parse_module

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota",
         "partition-id", "replica-id", "while", "conditional", "call", "async-start",
         "async-update", "async-done", "opt-barrier", "domain", "add-dependency"}  # fmt: skip
# custom calls that move nothing: room set aside, two neighbouring buffers seen as one, promises
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass
class Collective:
    """One kind of exchange between devices, over a whole run of the program.

    Attributes:
        count: how often it runs.
        bytes_by_type: bytes that one device sends, by element type.
    """

    count: float = 0.0
    bytes_by_type: dict[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        """Bytes that one device sends, of all types."""
        return sum(self.bytes_by_type.values(), 0.0)


@dataclass
class ProgramCounts:
    """What one device does when a program runs once.

    Attributes:
        flops: of matrix products and convolutions, two per multiply-add; those inside kernels
            that the text does not show, as cuDNN's attention, are missing.
        hbm_bytes: an estimate of what is read and written in the device's main memory: operands
            and results of instructions, slices and updates in place counted by their own size.
        collectives: by kind, `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` and
            `collective-permute`.
        unknown_loops: loops whose number of turns the text does not tell; counted as one turn.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: dict[str, Collective] = field(default_factory=dict)
    unknown_loops: int = 0

    @property
    def collective_bytes(self) -> float:
        """Bytes that one device sends in all exchanges."""
        return sum((each.bytes for each in self.collectives.values()), 0.0)

    def add(self, other: "ProgramCounts", times: float = 1.0) -> None:
        """Adds another part of the program that runs so many times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.unknown_loops += other.unknown_loops
        for kind, found in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            mine.count += times * found.count
            for dtype, size in found.bytes_by_type.items():
                mine.bytes_by_type[dtype] = mine.bytes_by_type.get(dtype, 0.0) + times * size


def count_program(text: str) -> ProgramCounts:
    """Counts a program from `compiled.as_text()`: loops by their turns, the dearest branch.

    A ring's convention for the bytes that one of `n` devices sends: all-gather (n-1)/n of the
    result, reduce-scatter and all-to-all (n-1)/n of the operand, all-reduce twice that, a
    permutation its operand.

    Raises:
        ValueError: text that is no HLO module.
    """
    module = parse_module(text)
    return _Counter(module).computation(module.entry, fused=False)


class _Counter:
    """Counts computations, each once."""

    def __init__(self, module: Module):
        self.module = module
        self._known: dict[tuple[str, bool], ProgramCounts] = {}

    def computation(self, name: str, *, fused: bool) -> ProgramCounts:
        if (name, fused) not in self._known:
            total = ProgramCounts()
            computation = self.module.computations[name]
            scattered = fused and _is_reduce_scatter(computation)
            for instruction in computation:
                self._add(total, instruction, computation, fused, scattered)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _add(
        self,
        total: ProgramCounts,
        instruction: Instruction,
        where: Computation,
        fused: bool,
        scattered: bool,
    ) -> None:
        op = instruction.opcode
        if op in ("dot", "convolution", "custom-call"):
            total.flops += product_flops(instruction, where)
        kind = op.removesuffix("-start")
        if kind in _SENT:
            _add_collective(total, instruction, where, self.module, kind, scattered)
        called = instruction.called
        if op == "while":
            turns = self._turns(instruction, where)
            total.unknown_loops += turns is None
            body = instruction.attribute_name("body")
            total.add(self.computation(body, fused=False), 1.0 if turns is None else float(turns))
        elif op == "conditional":
            branches = [self.computation(name, fused=False) for name in called]
            total.add(max(branches, key=lambda c: (c.flops, c.collective_bytes, c.hbm_bytes)))
        elif op in ("call", "async-start", "fusion"):
            for name in called:
                total.add(self.computation(name, fused=fused or op == "fusion"))
        if not fused:
            total.hbm_bytes += self._hbm_bytes(instruction, where)

    def _turns(self, loop: Instruction, where: Computation) -> int | None:
        """How often a loop's body runs; None where the text does not tell."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.module.computations[loop.attribute_name("condition")]
        compare = condition.root
        bounds = [i.integer for i in condition if i.integer is not None]
        if compare.opcode == "fusion":  # the comparison, and perhaps its bound, moved inside
            inner = self.module.computations[compare.called[0]]
            bounds += [i.integer for i in inner if i.integer is not None]
            counter = next((i for i in condition if i.opcode == "get-tuple-element"), None)
            compare = inner.root
        else:
            operands = [condition.find(name) for name in compare.operands]
            counter = next((i for i in operands if i and i.opcode == "get-tuple-element"), None)
        if compare.opcode != "compare" or len(bounds) != 1 or counter is None:
            return None
        start = _tuple_element(where, loop.operands[0], counter)
        first = start.integer if start is not None and start.integer is not None else 0
        body = self.module.computations[loop.attribute_name("body")]
        turns = bounds[0] - first + ("direction=LE" in compare.rest)
        return max(-(-turns // _step(body, counter)), 0)

    def _hbm_bytes(self, instruction: Instruction, where: Computation) -> float:
        op = instruction.opcode
        if op in _FREE or op.endswith("-done"):
            return 0.0
        if op == "custom-call" and instruction.custom_target in _FREE_CALLS:
            return 0.0
        hbm = self.module.in_hbm
        if op == "fusion":
            return self._fusion_bytes(instruction, where)
        if op.endswith("-start") and op.removesuffix("-start") not in _SENT:
            # a copy or a slice: (there, here, token), one read and one write
            moved = math.prod(instruction.shapes[0].dims) * instruction.shapes[0].item_bytes
            if op == "slice-start":
                moved = min(shape.bytes for shape in instruction.shapes[:2])
            return float(moved * sum(hbm(shape) for shape in instruction.shapes[:2]))
        operands = [where.shapes(name) for name in instruction.operands]
        written = _bytes(instruction.shapes, hbm)
        if op in _SLICES:
            read = [shape.bytes for shape in instruction.shapes] if operands else []
            rest = sum(_bytes(shapes, hbm) for shapes in operands[1:])
            return written + rest + (sum(read) if _bytes(operands[0], hbm) else 0)
        if op == "dynamic-update-slice":
            update = operands[1]
            return _bytes(update, hbm) + (_bytes(update, _anywhere) if written else 0)
        if op == "scatter":  # reads, adds and writes rows of the first operand where it lies
            updates = operands[(len(operands) - 1) // 2 + 1 :]
            return 3 * sum(_bytes(shapes, _anywhere) for shapes in updates)
        if op.endswith("-start"):  # the result's tuple repeats the operands
            return 2 * sum(_bytes(shapes, hbm) for shapes in operands)
        return written + sum(_bytes(shapes, hbm) for shapes in operands)

    def _fusion_bytes(self, fusion: Instruction, where: Computation) -> float:
        inner = self.module.computations[fusion.called[0]]
        total = 0.0
        for number, operand in enumerate(fusion.operands):
            shapes = where.shapes(operand)
            whole = _bytes(shapes, self.module.in_hbm)
            if whole:
                total += min(whole, self._read_bytes(inner, inner.parameter(number)))
        if inner.root.custom_target.startswith("AsyncCollective"):
            # where it starts the operand is handed on, and all that it will write counts
            starts = inner.root.custom_target == "AsyncCollectiveStart"
            return total + (_bytes(fusion.shapes[1:], self.module.in_hbm) if starts else 0.0)
        results = [inner.root]
        if inner.root.opcode == "tuple":
            results = [found for name in inner.root.operands if (found := inner.find(name))]
        for shape, result in zip(fusion.shapes, results, strict=False):
            if result.opcode == "parameter" or _goes_on(result, inner):
                continue  # handed on, or written by a collective that was counted already
            while result.opcode in ("bitcast", "convert", "copy") and result.operands:
                source = inner.find(result.operands[0])
                if source is None:
                    break
                result = source
            size = shape.bytes
            if result.opcode == "dynamic-update-slice":
                size = min(size, _bytes(inner.shapes(result.operands[1]), _anywhere))
            total += size * self.module.in_hbm(shape)
        return total

    def _read_bytes(self, inner: Computation, name: str) -> float:
        """How much of a fusion's parameter is read: slices of it, or all."""
        total = 0.0
        for user in inner.users(name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += _bytes(user.shapes, _anywhere)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass  # written in place
            elif user.opcode in ("tuple", "custom-call") or _goes_on(user, inner):
                pass  # handed on
            elif user.opcode == "bitcast":
                total += self._read_bytes(inner, user.name)
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called[0]]
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read_bytes(nested, nested.parameter(number))
            else:
                return _bytes(inner.shapes(name), _anywhere)
        return total


def _anywhere(shape: Shape) -> bool:
    return True


def _bytes(shapes: list[Shape], where: Callable[[Shape], bool]) -> float:
    return float(sum(shape.bytes for shape in shapes if where(shape)))


def _step(body: Computation, counter: Instruction) -> int:
    """How much a turn adds to a loop's counter: more than 1 where the compiler unrolled it."""
    index = re.search(r"index=(\d+)", counter.rest)
    if index is None or body.root.opcode != "tuple":
        return 1
    total, found = 0, body.find(body.root.operands[int(index[1])])
    while found is not None and found.opcode in ("add", "copy", "bitcast"):
        operands = [body.find(name) for name in found.operands]
        total += sum(each.integer for each in operands if each and each.integer is not None)
        found = next((each for each in operands if each and each.integer is None), None)
    return max(total, 1)


def _tuple_element(where: Computation, name: str, counter: Instruction) -> Instruction | None:
    """The element of a loop's first tuple that its counter starts from."""
    start, index = where.find(name), re.search(r"index=(\d+)", counter.rest)
    if start is None or start.opcode != "tuple" or index is None:
        return None
    found = where.find(start.operands[int(index[1])])
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = where.find(found.operands[0])
    return found


# kind -> bytes a device sends per byte of its operand, in a group of n
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def _add_collective(
    total: ProgramCounts,
    instruction: Instruction,
    where: Computation,
    module: Module,
    kind: str,
    scattered: bool,
) -> None:
    size = group_size(instruction.rest, module.devices)
    if kind == "collective-permute":
        size = 2
    if size == 1 or _goes_on(instruction, where):
        return
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    found = total.collectives.setdefault(kind, Collective())
    found.count += 1
    for name in instruction.operands:
        for shape in where.shapes(name):
            sent = shape.bytes * _SENT[kind](size)
            found.bytes_by_type[shape.dtype] = found.bytes_by_type.get(shape.dtype, 0.0) + sent


def _goes_on(instruction: Instruction, where: Computation) -> bool:
    """Whether this repeats a collective that was counted where it starts.

    TPU programs spread one over a chain of fusions, each of which names it again.
    """
    starts = where.root.custom_target == "AsyncCollectiveStart"
    return "chain_id=" in instruction.rest and not starts


def group_size(attributes: str, devices: int) -> int:
    """Devices that exchange with each other, from an instruction's `replica_groups`.

    Args:
        attributes: the instruction's attributes.
        devices: of the whole program, the group where none is named.
    """
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=@?mesh[^\[]*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(size or axes[axis]) for axis, size in parts)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    return devices


def _is_reduce_scatter(computation: Computation) -> bool:
    """Whether a fusion sums over devices and keeps a share: how TPU programs say reduce-scatter."""
    reduced = [i for i in computation if i.opcode == "all-reduce"]
    if len(reduced) != 1:
        return False
    users = computation.users(reduced[0].name)
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "transpose"):
        users = computation.users(users[0].name)
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
