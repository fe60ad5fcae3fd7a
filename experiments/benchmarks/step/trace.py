"""Where the time of a compiled program goes: JAX's own trace, joined with the program's text.

A trace tells when each instruction of the program ran; the text tells what the instruction is, and which scopes of the
source it comes from. A fusion has the name of its last operation.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from dp_rmt.clipping.taps import NORMS, SUMS
from experiments.benchmarks.scaling.hlo import ELEMENTWISE, Instruction, parse

Span = tuple[int, int, str]
"""Start and end in nanoseconds, and the name of an instruction."""

_KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("matrix products", frozenset({"dot", "convolution"})),
    ("scatter, gather, sort", frozenset({"scatter", "gather", "sort"})),
    ("reductions", frozenset({"reduce", "reduce-window"})),
    ("entry by entry", ELEMENTWISE - {"convert"}),
)
_PRODUCTS = re.compile(r'custom_call_target="[^"]*(gemm|matmul|conv|cudnn|fmha)', re.IGNORECASE)
_CONTROL = frozenset({"while", "conditional", "call"})
_PARTS = (
    (f"/{NORMS}", "norms of clipping"),
    (f"/{SUMS}", "sums of clipping"),
    ("/noise/", "noise"),
    ("/denoise/", "denoiser"),
    ("transpose(", "backward"),
    ("jvp(", "forward"),
)
_HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a program's text says of one instruction.

    Attributes:
      kind: of operation; the dearest kind in a fusion.
      part: of a step, by the scopes of the source.
      source: file, line and function of this project that it comes from; empty where the text does not say.
      shape: of the result.
    """

    kind: str
    part: str
    source: str
    shape: str


def operations(hlo: str, root: Path) -> dict[str, Operation]:
    """What every instruction is, by its name.

    Args:
      hlo: ``compiled.as_text()``.
      root: folder of the project, to tell its files from others.
    """
    computations, _ = parse(hlo)
    source_of = _sources(hlo, root)

    def opcodes(instruction: Instruction) -> set[str]:
        inside = instruction.called("calls") if instruction.op == "fusion" else []
        return {instruction.op}.union(*(opcodes(each) for name in inside for each in computations[name]))

    def kind(instruction: Instruction) -> str:
        if instruction.op in _CONTROL:
            return "loops, choices, calls"
        if instruction.op == "custom-call":
            return "matrix products" if _PRODUCTS.search(instruction.rest) else "library calls"
        found = opcodes(instruction)
        return next((name for name, codes in _KINDS if codes & found), "copies and fills")

    return {
        one.name: Operation(kind(one), part_of(_scopes(one)), source_of(one), one.shape)
        for computation in computations.values()
        for one in computation
    }


def part_of(scopes: str) -> str:
    """The part of a step that an operation belongs to, by its scopes.

    >>> part_of("jit(step)/transpose(jvp(Model))/layer/squared_norm/dot_general"), part_of("jit(step)/adam/mul")
    ('norms of clipping', 'the rest')
    """
    if not scopes:
        return "without a name"
    return next((part for scope, part in _PARTS if scope in scopes), "the rest")


def host_transfers(hlo: str) -> int:
    """Instructions that wait for the host or send to it: there must be none within a step."""
    computations, _ = parse(hlo)
    every = [one for computation in computations.values() for one in computation]
    return sum(one.op in _HOST or (one.op == "custom-call" and "callback" in one.rest) for one in every)


def traced_seconds(run: Callable[[], object], hlo: str, repeats: int) -> tuple[Counter[str], Counter[str]]:
    """Runs a program under JAX's profiler.

    Args:
      run: runs the program once, to its end; it has run before.
      hlo: the program's text.
      repeats: how often.

    Returns:
      For each instruction the seconds in itself, without what it calls, and how often it ran; both of one run.

    Raises:
      RuntimeError: the trace says nothing of the program.
    """
    found = re.match(r"HloModule ([\w.-]+)", hlo)
    module = found[1] if found else ""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        lines = _lines(jax.profiler.ProfileData.from_file(str(path)), module)
    if not any(lines):
        raise RuntimeError(f"JAX's trace has no instruction of {module!r} on {jax.default_backend()}")
    seconds: Counter[str] = Counter()
    for line in lines:
        seconds.update(self_times(line))
    calls = Counter(name for line in lines for _, _, name in line)
    per_run = Counter({name: value * 1e-9 / repeats for name, value in seconds.items()})
    return per_run, Counter({name: count // repeats for name, count in calls.items()})


def self_times(spans: Iterable[Span]) -> Counter[str]:
    """Time in each instruction without that in the instructions it calls, which lie inside its own span.

    >>> sorted(self_times([(0, 10, "while"), (1, 4, "dot"), (5, 9, "dot")]).items())
    [('dot', 7), ('while', 3)]
    """
    times: Counter[str] = Counter()
    around: list[Span] = []
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1][1] <= start:
            around.pop()
        if around:
            times[around[-1][2]] -= end - start
        times[name] += end - start
        around.append((start, end, name))
    return times


def _lines(data: jax.profiler.ProfileData, module: str) -> list[list[Span]]:
    """The spans of a module's instructions by thread or stream: of the devices, or of the CPU where there is none."""
    of_devices: list[list[Span]] = []
    of_host: list[list[Span]] = []
    for plane in data.planes:
        for line in plane.lines:
            spans = []
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == module and "hlo_op" in stats:
                    start = round(event.start_ns)
                    spans.append((start, start + round(event.duration_ns), str(stats["hlo_op"])))
            (of_devices if plane.name.startswith("/device:") else of_host).append(spans)
    return of_devices if any(of_devices) else of_host


def _scopes(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _sources(hlo: str, root: Path) -> Callable[[Instruction], str]:
    """Looks up the innermost line of the project in the tables at the head of a module's text."""
    tables = {name: _table(hlo, name) for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}
    frames, places = ({k: _fields(v) for k, v in tables[name].items()} for name in ("StackFrames", "FileLocations"))

    def source(instruction: Instruction) -> str:
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        number = int(found[1]) if found else 0
        while number in frames:
            place = places.get(frames[number]["file_location_id"], {})
            path = Path(tables["FileNames"].get(place.get("file_name_id", 0), "").strip('"'))
            if path.is_relative_to(root):
                function = tables["FunctionNames"].get(place.get("function_name_id", 0), "").strip('"')
                return f"{path.relative_to(root)}:{place['line']} {function}"
            number = frames[number].get("parent_frame_id", 0) - 1  # XLA counts parents from one more
        return ""

    return source


def _table(hlo: str, name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", hlo, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    return {int(number): value for number, _, value in (line.partition(" ") for line in lines)}


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}
