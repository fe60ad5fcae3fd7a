"""What a compiled program does on one device, read in its HLO text: matrix products, bytes of collectives.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and knows no collectives. The text has
the loops' trip counts, the shapes of the parts that one device holds, and the groups of devices that communicate.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "and",
        "ceil",
        "clamp",
        "compare",
        "convert",
        "cosine",
        "divide",
        "exponential",
        "exponential-minus-one",
        "floor",
        "log",
        "log-plus-one",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "power",
        "remainder",
        "round-nearest-even",
        "rsqrt",
        "select",
        "shift-left",
        "shift-right-arithmetic",
        "shift-right-logical",
        "sign",
        "sine",
        "sqrt",
        "subtract",
        "tanh",
        "xor",
    ]
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass
class Cost:
    """Of one run of a program on one device.

    Attributes:
      matrix_flops: twice the multiply-adds of all products.
      vector_ops: results of operations on single entries, integers too.
      payload: bytes by (kind of collective, devices that take part): of what each device holds afterwards; of what it
        puts in, where that is more (reduce-scatter).
      unknown_loops: loops without a known trip count, whose bodies are counted once.
    """

    matrix_flops: float = 0.0
    vector_ops: float = 0.0
    payload: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.matrix_flops + other.matrix_flops,
            self.vector_ops + other.vector_ops,
            self.payload + other.payload,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, count: int) -> Cost:
        """The cost of so many runs."""
        payload = Counter({key: count * size for key, size in self.payload.items()})
        return Cost(count * self.matrix_flops, count * self.vector_ops, payload, self.unknown_loops)

    @property
    def sent(self) -> float:
        """Bytes that each device sends by ring algorithms: of n devices (n - 1) / n of the payload, twice for a sum."""

        def share(kind: str, n: int) -> float:
            return 1.0 if kind == "collective-permute" else (1 + (kind == "all-reduce")) * (n - 1) / n

        return sum(size * share(kind, n) for (kind, n), size in self.payload.items())


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a module: its name, the shape of its result, its opcode, and what follows the opening bracket."""

    name: str
    shape: str
    op: str
    rest: str

    def operands(self) -> list[str]:
        """Names, without the shapes that some versions print before them."""
        depth, end = 1, 0
        for end, character in enumerate(self.rest):  # noqa: B007
            depth += (character in "({[") - (character in ")}]")
            if depth == 0:
                break
        return re.findall(r"%([\w.-]+)", self.rest[:end])

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute holds."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest)
        return re.findall(r"[\w.-]+", found[1]) if found else []


def cost_of(hlo: str) -> Cost:
    """Counts what one device does in one run of a compiled program.

    Of the branches of a conditional the cheapest counts: in this project the others are what is done for rare cases
    (gradients that are not finite, matrices whose spectrum needs a full decomposition). Programs that skip
    microbatches at run time are not for this.

    Args:
      hlo: ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
      A `Cost`. Library calls (LAPACK) count nothing.

    >>> import jax, jax.numpy as jnp
    >>> loop = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0])
    >>> cost_of(loop.lower(jnp.ones((4, 4))).compile().as_text()).matrix_flops
    640.0
    """
    computations, entry = parse(hlo)
    known: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name not in known:
            shapes = {instruction.name: instruction.shape for instruction in computations[name]}
            known[name] = sum((one(instruction, shapes) for instruction in computations[name]), Cost())
        return known[name]

    def one(instruction: Instruction, shapes: dict[str, str]) -> Cost:
        op = instruction.op.removesuffix("-start")
        if op == "dot":
            return Cost(matrix_flops=_dot_flops(instruction, shapes))
        if op in ELEMENTWISE:
            return Cost(vector_ops=float(sum(math.prod(sizes) for _, sizes in _arrays(instruction.shape))))
        if op in COLLECTIVES:
            return Cost(payload=Counter({(op, _group_size(instruction)): _payload(instruction, op, shapes)}))
        if op == "while":
            trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.rest)
            body = cost(instruction.called("body")[0])
            return body.times(int(trips[1])) if trips else body + Cost(unknown_loops=1)
        if op == "conditional":
            names = [*instruction.called("branch_computations")]
            names = names or [*instruction.called("true_computation"), *instruction.called("false_computation")]
            return min((cost(branch) for branch in names), key=lambda c: (c.matrix_flops, c.sent))
        if op in ("fusion", "call", "async"):
            called = instruction.called("calls") or instruction.called("to_apply")
            return sum((cost(computation) for computation in called), Cost())
        return Cost()

    return cost(entry)


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Reads the text of a module: its computations by name, and the name of the one that is entered."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := _COMPUTATION.match(line):
            current = header["name"]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(found["name"], found["shape"], found["op"], found["rest"]))
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY; pass compiled.as_text()")
    return computations, entry


def _dot_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    (left, *_) = instruction.operands()
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    (_, sizes), (_, product) = next(_arrays(shapes[left])), next(_arrays(instruction.shape))
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(product) * math.prod(sizes[axis] for axis in axes)


def _payload(instruction: Instruction, op: str, shapes: dict[str, str]) -> int:
    if op in ("reduce-scatter", "all-reduce"):
        return sum(_bytes(shapes[name]) for name in instruction.operands())
    if op == "all-gather" and instruction.op.endswith("-start"):  # (operands, results)
        return _bytes(instruction.shape) - sum(_bytes(shapes[name]) for name in instruction.operands())
    return _bytes(instruction.shape)


def _group_size(instruction: Instruction) -> int:
    """Of ``replica_groups=``: ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` or ``mesh['a'=2,'b'=2] {'b'}``."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", instruction.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # 'b':(1)2 is a part of the axis, of size 2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest):
        return found[1].count(",") + 1
    if instruction.op.startswith("collective-permute"):
        return 2
    raise ValueError(f"no replica_groups in {instruction.op}({instruction.rest[:200]}")


def _bytes(shape: str) -> int:
    return sum(_BYTES[kind] * math.prod(sizes) for kind, sizes in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for kind, sizes in _ARRAY.findall(shape):
        if kind in _BYTES:
            yield kind, [int(size) for size in sizes.split(",") if size]
