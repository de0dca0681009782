"""An HLO module as its text gives it: computations, instructions and their shapes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|(?:true|false)_computation)="
                     r"\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An array's element type, sizes, and the number of the memory space it lies in."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def item_bytes(self) -> float:
        """Bytes of an element."""
        if self.dtype in _ITEM_BITS:
            return _ITEM_BITS[self.dtype] / 8
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) / 8 if bits else 0.0

    @property
    def bytes(self) -> float:
        """Bytes of the array, without a layout's padding."""
        return math.prod(self.dims) * self.item_bytes


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        shapes: of the result, a tuple's elements one after the other.
        opcode: such as `fusion`.
        operands: names, of a constant its value.
        rest: the attributes.
    """

    name: str
    shapes: list[Shape]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """Computations that the instruction calls, a loop's body and condition apart."""
        return [n.lstrip("% ") for found in _CALLED.findall(self.rest) for n in found.split(",")]

    @property
    def custom_target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def integer(self) -> int | None:
        """The value of a constant whole number."""
        whole = self.opcode == "constant" and self.shapes[0].dtype[0] in "su"
        text = self.operands[0] if whole and self.operands else ""
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def attribute_name(self, attribute: str) -> str:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name} has no {attribute}")
        return found[1]


@dataclass
class Computation:
    """Instructions in the order of their execution."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root_name: str = ""
    _users: dict[str, list[Instruction]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return self.instructions[self.root_name]

    def find(self, name: str) -> Instruction | None:
        """An instruction by its name."""
        return self.instructions.get(name)

    def shapes(self, name: str) -> list[Shape]:
        """The shapes of an instruction's result; none of an unknown one."""
        return self.instructions[name].shapes if name in self.instructions else []

    def parameter(self, number: int) -> str:
        """The name of a parameter."""
        return next(
            i.name for i in self if i.opcode == "parameter" and i.operands[0] == str(number)
        )

    def users(self, name: str) -> list[Instruction]:
        """Instructions that read another's result."""
        if not self._users:
            for instruction in self:
                for operand in dict.fromkeys(instruction.operands):
                    self._users.setdefault(operand, []).append(instruction)
        return self._users.get(name, [])


@dataclass
class Module:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that is run.
        devices: how many run it together.
        tiled: whether it is a TPU's, where other memory spaces than 0 are no HBM.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int
    tiled: bool

    def in_hbm(self, shape: Shape) -> bool:
        """Whether an array lies in the device's main memory."""
        return shape.space == 0 or not self.tiled


def parse_module(text: str) -> Module:
    """Reads a module's text.

    Raises:
        ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if not line or line.startswith("}"):
            current = None
        elif current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
        elif named := _NAME.match(line):
            instruction = _instruction(named[2], line[named.end() :])
            current.instructions[instruction.name] = instruction
            if named[1]:
                current.root_name = instruction.name
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    head = text[: text.find("\n")]
    sizes = [re.search(rf"{name}=(\d+)", head) for name in ("num_partitions", "replica_count")]
    devices = math.prod(int(size[1]) for size in sizes if size)
    return Module(computations, entry, devices, ":T(" in text)


def _instruction(name: str, text: str) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"no instruction: {name} = {text[:80]}")
    close = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : close - 1]
    operands = re.findall(r"%([\w.\-]+)", inside) or [inside.strip()]
    shapes = [_shape(*found) for found in _SHAPE.findall(text[:end])]
    rest = text[close:]
    return Instruction(name, shapes, opcode[1], tuple(o for o in operands if o), rest)


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n)
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
