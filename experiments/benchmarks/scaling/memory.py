"""Does a private step fit where one without privacy does? A 4B decoder's, full fine-tuning, from compiled programs.

    python -m experiments.benchmarks.scaling.memory

compiles Qwen3-4B's step (bfloat16 computation, float32 parameters, gradient and moments, layers computed again, four
microbatches with one example of 512 tokens on each device) for 8 and 16 virtual CPU devices that divide its parameters,
and keeps what the compiler says that one device needs as JSON in experiments/benchmarks/results/scaling/; what is there
is not compiled again. Then it prints the table of docs/scaling.md. Nothing is run, and there are no weights. A program
takes half a minute to two minutes of one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from experiments.benchmarks.scaling.hardware import CHIPS
from experiments.benchmarks.scaling.main import compiled

DEVICES = (8, 16)
PROBLEM = "qwen3_4b"
VARIANTS = ("plain_remat", "denoised_remat", "denoised_remat_ghost")
GIGABYTE = 1e9


def memory_table(records: Sequence[Mapping[str, Any]]) -> str:
    """What one device needs, a row for each program, in Markdown.

    Args:
      records: of `experiments.benchmarks.scaling.programs`, those of the plain steps among them.

    Returns:
      The table; "times plain" compares with the plain step of as many devices.
    """
    plain = {r["devices"]: r["needed_bytes"] for r in records if r["variant"] == "plain_remat"}
    lines = [
        "| devices | step | arguments | temporary | GB a device | times plain | fits |",
        "|--:|---|--:|--:|--:|--:|---|",
    ]
    for r in records:
        names = r["variant"].split("_")
        step = names[0] + ("" if names[0] == "plain" else ", ghost" if "ghost" in names else ", book-keeping")
        sizes = [f"{r[name] / GIGABYTE:.2f}" for name in ("argument_bytes", "temp_bytes", "needed_bytes")]
        ratio = r["needed_bytes"] / plain[r["devices"]]
        fits = ", ".join(chip.name for chip in CHIPS.values() if r["needed_bytes"] <= chip.hbm_bytes)
        lines.append(f"| {r['devices']} | {step} | {' | '.join(sizes)} | {ratio:.2f} | {fits} |")
    return "\n".join(lines)


def record_files(folder: Path) -> list[Path]:
    """Where the records are, in the order of the table."""
    return [folder / f"{PROBLEM}-{devices}-{variant}.json" for devices in DEVICES for variant in VARIANTS]


def main(argv: list[str]) -> None:
    """Compiles what is missing and prints the table."""
    del argv
    files = record_files(Path(flags.FLAGS.results))
    try:
        for path in files:
            if not path.exists():
                _, devices, variant = path.stem.split("-")
                record = compiled(1, int(devices), 1, variant, PROBLEM)
                write_atomically(path, json.dumps(record, indent=1) + "\n")
                print(f"{path.stem}: {record['needed_bytes'] / GIGABYTE:.2f} GB", file=sys.stderr, flush=True)
    except RuntimeError as error:
        sys.exit(f"scaling_memory: {error}")
    print(memory_table([json.loads(path.read_text()) for path in files]))


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/benchmarks/results/scaling", "Folder of the records.")
    command_line.run(main)
