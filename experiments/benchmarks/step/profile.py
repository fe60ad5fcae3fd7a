r"""Where the time of a step goes, by kind of operation and by part of the step, on whatever device JAX has.

    python -m experiments.benchmarks.step.profile --model=roberta_base --batch_size=8 --sequence_length=128

Programs are gradients (plain, vmap, ghost, bookkeeping) and whole private updates (noisy, and the other arms of
`experiments.benchmarks.update`). The times are those of JAX's own trace; operations and bytes are XLA's own counts, in
which the body of a loop counts once. Prints a table, writes a JSON file under --results.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting import machine
from experiments.benchmarks import update as updates
from experiments.benchmarks.rounds import alternate
from experiments.benchmarks.scaling.hlo import parse
from experiments.benchmarks.step import record_file, trace
from experiments.benchmarks.step.models import MODELS, Workload, make_workload
from experiments.benchmarks.step.programs import OWN_ARMS, compile_program

ROOT = Path(__file__).parents[3]
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "Shapes; the weights are random.", required=True)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Examples, all at once.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 128, "Tokens of each example; there is no padding.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype; parameters are float32.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "Instead of the model's own number.", lower_bound=1)
_PROGRAMS = flags.DEFINE_list("programs", ["plain", "bookkeeping", "noisy"], "What to profile.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of timed steps, in turns.", lower_bound=1)
_TRACED = flags.DEFINE_integer("traced", 2, "Steps under the profiler.", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 25, "Operations to list of each program.", lower_bound=1)
_CLIP_NORM = flags.DEFINE_float("l2_clip_norm", 0.1, "Of all clipped programs.")
_RESULTS = flags.DEFINE_string("results", "experiments/benchmarks/results/step", "Folder of the records.")

_COUNTED = ("dot", "custom-call", "fusion", "copy", "transpose", "convert", "while", "conditional")


def main(argv: list[str]) -> None:
    """Profiles, prints the tables, writes the record."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    try:
        found = _profile()
    except (ValueError, RuntimeError) as error:
        command_line.stop(error)
    path = record_file.write(found, _RESULTS.value, "-profile")
    print(render(found))
    print(f"Record: {path}")


def _profile() -> dict[str, Any]:
    known = (*OWN_ARMS, *updates.ARMS)
    if unknown := sorted(set(_PROGRAMS.value) - set(known)):
        raise ValueError(f"--programs={','.join(unknown)} is unknown; choose among {', '.join(known)}")
    sizes: dict[str, Any] = {"batch_size": _BATCH_SIZE.value, "sequence_length": _LENGTH.value}
    workload = make_workload(_MODEL.value, **sizes, dtype=_DTYPE.value, num_layers=_NUM_LAYERS.value)
    compiled, runs = {}, {}
    for name in _PROGRAMS.value:
        print(f"compiling {name}", file=sys.stderr, flush=True)
        compiled[name], runs[name] = _compiled(name, workload)
        runs[name]()
    rounds = alternate(runs, _REPEATS.value)
    return {
        "model": _MODEL.value,
        "dtype": _DTYPE.value,
        "shapes": sizes | workload.shapes(),
        "repeats": _REPEATS.value,
        "command": " ".join(
            ["python -m experiments.benchmarks.step.profile", *(a for a in sys.argv[1:] if "--results" not in a)]
        ),
        "machine": machine.description(),
        "versions": machine.versions(("jax", "jaxlib", "flax", "optax", "numpy")),
        "programs": {
            name: {"seconds_of_rounds": rounds[name], "seconds": statistics.median(rounds[name])}
            | _described(program, runs[name])
            for name, program in compiled.items()
        },
    }


def _compiled(name: str, workload: Workload) -> tuple[jax.stages.Compiled, Any]:
    """A program, and a function that runs it once and drops what it gives."""
    if name not in OWN_ARMS:
        update = updates.compile_update(workload, name, l2_clip_norm=_CLIP_NORM.value, microbatch_size=None)
        return update.program, update.run
    program = compile_program(workload, name, l2_clip_norm=_CLIP_NORM.value, memory_budget=math.inf)
    if program.compiled is None:
        raise ValueError(f"{name}: {program.reason}")
    return program.compiled, functools.partial(_run, program, workload)


def _run(program: Any, workload: Workload) -> None:
    program.run(workload)


def _described(program: jax.stages.Compiled, run: Any) -> dict[str, Any]:
    """What the compiler and the trace say of a program."""
    hlo = program.as_text() or ""
    known = trace.operations(hlo, ROOT)
    seconds, calls = trace.traced_seconds(run, hlo, _TRACED.value)
    unknown = trace.Operation("not in the program's text", "without a name", "", "")
    kinds: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for name, value in seconds.items():
        kinds[known.get(name, unknown).kind] += value
        parts[known.get(name, unknown).part] += value
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    opcodes = Counter(one.op for computation in parse(hlo)[0].values() for one in computation)
    return {
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
        "instructions": {name: opcodes[name] for name in _COUNTED},
        "host_transfers": trace.host_transfers(hlo),
        "traced_seconds": seconds.total(),
        "kinds": dict(kinds.most_common()),
        "parts": dict(parts.most_common()),
        "operations": [
            {"name": name, "seconds": value, "calls": calls[name]} | vars(known.get(name, unknown))
            for name, value in seconds.most_common(_TOP.value)
        ],
    }


def render(record: dict[str, Any]) -> str:
    """Tables of a record: programs beside each other, then the dearest operations of the last one."""
    programs = record["programs"]
    lines = [f"{record['model']}, {record['machine']['device_kind']}, {record['dtype']}; seconds of a step", ""]
    rows: list[list[str]] = [["", *programs]]
    rows.append(["seconds", *(f"{p['seconds']:.4g}" for p in programs.values())])
    for name, unit in (("flops", 1e9), ("bytes_accessed", 1e9), ("temp_bytes", 1e9)):
        values = ("-" if p[name] is None else f"{p[name] / unit:.3f}" for p in programs.values())
        rows.append([f"{name} / 1e9", *values])
    rows.append(["host transfers", *(str(p["host_transfers"]) for p in programs.values())])
    for group in ("kinds", "parts"):
        rows.append([f"by {group}", *("" for _ in programs)])
        names = dict.fromkeys(name for p in programs.values() for name in p[group])
        largest = {name: max(p[group].get(name, 0.0) for p in programs.values()) for name in names}
        for name in sorted(names, key=largest.__getitem__, reverse=True):
            shares = (f"{p[group].get(name, 0):.3f} {_share(p, group, name)}" for p in programs.values())
            rows.append([f"  {name}", *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    last = list(programs)[-1]
    lines += ["", f"The dearest operations of {last}:"]
    for one in programs[last]["operations"]:
        lines.append(f"{one['seconds']:8.3f} s  x{one['calls']}  {one['part']}: {one['kind']}, {one['shape'][:40]}")
        lines.append(f"            {one['name']}  {one['source']}")
    return "\n".join(lines)


def _share(program: dict[str, Any], group: str, name: str) -> str:
    return f"{program[group].get(name, 0) / program['traced_seconds']:4.0%}"


if __name__ == "__main__":
    command_line.run(main)
