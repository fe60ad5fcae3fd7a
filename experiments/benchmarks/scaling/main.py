"""Scale on paper: the cost model of docs/scaling.md, and what compiled programs say of it.

    python -m experiments.benchmarks.scaling.main

compiles the private step of a small decoder for 8, 64 and 256 virtual CPU devices (never runs it), each in a process of
its own, and keeps what one device does as JSON in experiments/benchmarks/results/scaling/; what is there is not
compiled again. Then it prints the tables of docs/scaling.md: compiled against counted, and the least times on TPU pods
and H100 nodes. A program takes about half a minute of one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from experiments.benchmarks.scaling.cost_model import (
    FLOAT32,
    Layout,
    exchange_bytes,
    fastest_layout,
    gather_bytes,
    gradient_bytes,
    norm_flops,
    plain_flops,
    remat_flops,
    step_seconds,
)
from experiments.benchmarks.scaling.hardware import CHIPS, MODELS, Decoder

MESHES = (
    (1, 8, 1),
    (1, 64, 1),
    (1, 256, 1),
    (8, 8, 1),
    (32, 8, 1),
    (1, 2, 4),
    (1, 16, 4),
    (1, 64, 4),
    (2, 1, 4),
    (16, 1, 4),
    (64, 1, 4),
)
"""(data, fsdp, tensor): weak scaling of four layouts, with the same work on every device."""

SMALL = Decoder(256, 4, 256, 128, 768, 512)
"""The shapes of `experiments.benchmarks.scaling.programs.CONFIG`."""
TOKENS, EXAMPLES_PER_PART = 64, 2
"""And of its batch."""

POD_SETUPS = (("v5e", 64), ("v5e", 256), ("v6e", 64), ("v6e", 256), ("h100", 8), ("h100", 64), ("h100", 256))
BATCH, LENGTH = 1024, 512
"""Of the tables of least times."""


def compile_missing(folder: Path, meshes: Iterable[Sequence[int]], variants: Iterable[str]) -> None:
    """Compiles what the folder has no record of.

    Args:
      folder: of the records.
      meshes: (data, fsdp, tensor) each.
      variants: of `experiments.benchmarks.scaling.programs.compiled_step`.

    Raises:
      RuntimeError: a program could not be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        for data, fsdp, tensor in meshes:
            path = folder / f"{variant}-{data}x{fsdp}x{tensor}.json"
            if not path.exists():
                record = compiled(data, fsdp, tensor, variant)
                write_atomically(path, json.dumps(record, indent=1) + "\n")
                print(f"{path.stem}: {record['matrix_flops']:.4g} operations", file=sys.stderr, flush=True)


def compiled(data: int, fsdp: int, tensor: int, variant: str, problem: str = "small") -> dict[str, Any]:
    """The record of one program, compiled in a process of its own that has so many virtual devices."""
    given = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={data * fsdp * tensor}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{given} --xla_backend_optimization_level=0"}
    arguments = [*map(str, (data, fsdp, tensor)), variant, problem]
    command = [sys.executable, "-m", "experiments.benchmarks.scaling.programs", *arguments]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {finished.stderr.strip().splitlines()[-1]}")
    return json.loads(finished.stdout.splitlines()[-1])


def counted(
    data: int, fsdp: int, *, private: bool = True, remat: bool = False, denoised: bool = False
) -> dict[str, float]:
    """What the model says of the small decoder's program, without tensor parallelism.

    XLA for the CPU sums a gradient over all devices and then takes a part of it, where those for TPU and GPU scatter
    the sum: twice the bytes. Without ``data`` the gradient of the word table is divided; with it, it is summed whole.

    Args:
      data: devices with copies.
      fsdp: devices that divide the parameters.
      private: with the norms of ghost clipping.
      remat: with `nn.remat`.
      denoised: with what the denoiser exchanges; its products of small matrices are not counted.

    Returns:
      Products and bytes sent by one device.
    """
    tokens = EXAMPLES_PER_PART * TOKENS
    examples = EXAMPLES_PER_PART * data * fsdp
    layout = Layout(data, fsdp, examples, TOKENS, EXAMPLES_PER_PART, gathered=FLOAT32, remat=remat and private)
    flops = plain_flops(SMALL, tokens, TOKENS) + private * norm_flops(SMALL, tokens, TOKENS)
    flops += remat * remat_flops(SMALL, tokens, TOKENS, private=private)
    among, copies, everyone = ((n - 1) / n for n in (fsdp, data, data * fsdp))
    gradient = gradient_bytes(SMALL)
    sent = among * (gather_bytes(SMALL, layout) + 2 * gradient) + copies * 2 * gradient / fsdp
    vectors = 2 * FLOAT32 * tokens * SMALL.hidden  # forward and backward, each token's to where its columns are
    table = FLOAT32 * SMALL.vocab * SMALL.hidden
    sent += among * vectors if data == 1 else among * vectors / 2 + 2 * everyone * table
    return {"matrix_flops": flops, "sent_bytes": sent + denoised * everyone * exchange_bytes(SMALL, data * fsdp)}


def compiled_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Compiled against counted, a row for each program, in Markdown."""
    lines = [
        "| step | devices | data x fsdp x tensor | GFLOP a device | counted | MB sent a device | counted |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for record in records:
        mesh = record["mesh"]
        cells = [record["variant"], str(record["devices"]), f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}"]
        model: Mapping[str, float] = {}
        kind, _, remat = record["variant"].partition("_")
        is_denoised = kind == "denoised"
        if mesh["tensor"] == 1 and not (is_denoised and mesh["data"] > 1):
            private = kind != "plain"
            model = counted(mesh["data"], mesh["fsdp"], private=private, remat=bool(remat), denoised=is_denoised)
        for name, unit in (("matrix_flops", 1e9), ("sent_bytes", 1e6)):
            is_counted = model and not (is_denoised and name == "matrix_flops")
            cells += [f"{record[name] / unit:.3f}", f"{model[name] / unit:.3f}" if is_counted else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_table() -> tuple[str, list[dict[str, Any]]]:
    """The least times of a step of `BATCH` examples of `LENGTH` tokens, in Markdown and as records."""
    parts = ("products", "norms", "memory", "network", "update", "noise", "denoise", "denoise network")
    lines = [
        f"| model | devices | at once | {' | '.join(parts)} | step | without privacy |",
        "|---|---|--:|" + "--:|" * (len(parts) + 2),
    ]
    records = []
    for name, model in MODELS.items():
        for kind, devices in POD_SETUPS:
            layout = fastest_layout(model, CHIPS[kind], devices, BATCH, LENGTH)
            head = f"| {name} | {devices} x {CHIPS[kind].name} "
            if layout is None:
                lines.append(head + "| does not fit |" + " |" * (len(parts) + 2))
                continue
            seconds = step_seconds(model, CHIPS[kind], layout)
            records.append(
                {
                    "model": name,
                    "chip": kind,
                    "devices": devices,
                    "at_once": layout.at_once,
                    "remat": layout.remat,
                    **seconds,
                }
            )
            cells = [f"{seconds[part]:.3f}" for part in (*parts, "total", "plain")]
            lines.append(head + f"| {layout.at_once}{' (remat)' * layout.remat} | " + " | ".join(cells) + " |")
    return "\n".join(lines), records


def main(argv: list[str]) -> None:
    """Compiles what is missing, prints the tables, writes the records."""
    del argv
    folder = Path(flags.FLAGS.results)
    try:
        compile_missing(folder, MESHES, ("plain", "noisy", "denoised"))
        compile_missing(folder, MESHES[:1], ("plain_remat", "noisy_remat"))
    except RuntimeError as error:
        sys.exit(f"scaling: {error}")
    records = [json.loads(path.read_text()) for path in folder.glob("*x*x*.json")]
    order = lambda record: (record["variant"], record["mesh"]["tensor"], record["mesh"]["data"], record["devices"])  # noqa: E731
    print(compiled_table(sorted(records, key=order)))
    table, times = seconds_table()
    write_atomically(folder / "least_seconds.json", json.dumps(times, indent=1) + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    flags.DEFINE_string("results", "experiments/benchmarks/results/scaling", "Folder of the records.")
    command_line.run(main)
