r"""What a private step costs: arms side by side on one model, batch and dtype, in one process, timed in turns.

    python -m experiments.benchmarks.step.main --model=roberta_base --batch_size=32 --sequence_length=128 \\
        --dtype=float32

The arms are the plain gradient of the mean loss, this project's ways to clip per example, and peers
(``pip install -e ".[peers]"``); --torch adds Opacus's ghost clipping and its plain step, in a process of their own
(``pip install -e ".[peers-torch]"``). Every sum is compared with that of `dp_rmt.clipped_grad`
before anything is timed. Prints a table, writes a JSON file under --results.

With --updates whole private updates (clip, noise, Adam) are timed instead: the noisy one, and one for each of the named
backends of the denoiser and places of whitening (whitened_after, whitened_before):

    python -m experiments.benchmarks.step.main --model=minilm --batch_size=1024 --sequence_length=16 \
        --microbatch_sizes=32 --updates=subspace,gram,whitened_before
"""

from __future__ import annotations

import sys
from typing import Any

from absl import app, flags

from dp_rmt.finetuning import command_line
from dp_rmt.reporting import machine
from experiments.benchmarks.step import record_file
from experiments.benchmarks.step import table as profile_table
from experiments.benchmarks.step.measure import measure
from experiments.benchmarks.step.models import MODELS, make_workload
from experiments.benchmarks.step.programs import ARMS, microbatch_sizes
from experiments.benchmarks.step.torch_peers import measure_torch
from experiments.benchmarks.update import measure_updates

_MODEL = flags.DEFINE_enum("model", None, list(MODELS), "Shapes; the weights are random.", required=True)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 128, "Tokens of each example; there is no padding.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype; parameters are float32.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "Instead of the model's own number.", lower_bound=1)
_FLASH = flags.DEFINE_bool("flash_attention", False, "cuDNN's attention, for decoders in bfloat16 on NVIDIA GPUs.")
_REMAT = flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
_ARMS = flags.DEFINE_list("arms", list(ARMS), "What to compare with the plain gradient.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds of timed steps.", lower_bound=1)
_CLIP_NORM = flags.DEFINE_float("l2_clip_norm", 0.1, "Of all clipped arms.")
_SIZES = flags.DEFINE_list("microbatch_sizes", None, "To try where one gradient per example is kept; else B, B/4, ...")
_UPDATES = flags.DEFINE_list("updates", [], "Arms of `measure_updates`; times updates in the place of gradients.")
_BUDGET = flags.DEFINE_float("memory_budget", None, "GB that a step may need; default nine tenths of what is free.")
_TORCH = flags.DEFINE_bool("torch", False, "Also measure Opacus and plain torch.")
_RESULTS = flags.DEFINE_string("results", "experiments/benchmarks/results/step", "Folder of the records.")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "jax-privacy", "torch", "opacus", "transformers")


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the record; what is wrong with the flags ends it with one clear line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    try:
        found = _profile()
    except (ValueError, RuntimeError) as error:
        command_line.stop(error)
    kinds = {"updates": _UPDATES.value, "flash": _FLASH.value, "remat": _REMAT.value}
    kind = "".join(f"-{name}" for name, is_set in kinds.items() if is_set)
    path = record_file.write(found, _RESULTS.value, kind)
    print(profile_table.render(found))
    print(f"Record: {path}")


def _profile() -> dict[str, Any]:
    unknown = sorted(set(_ARMS.value) - set(ARMS))
    if unknown:
        raise ValueError(f"--arms={','.join(unknown)} is unknown; choose among {', '.join(ARMS)}")
    try:
        tried = None if _SIZES.value is None else [int(size) for size in _SIZES.value]
    except ValueError as error:
        raise ValueError(f"--microbatch_sizes: {error}; give numbers, such as 2,8") from error
    sizes = microbatch_sizes(_BATCH_SIZE.value, tried)
    sequences: dict[str, Any] = {"batch_size": _BATCH_SIZE.value, "sequence_length": _LENGTH.value}
    given: dict[str, Any] = {**sequences, "dtype": _DTYPE.value, "num_layers": _NUM_LAYERS.value}
    settings: dict[str, Any] = {"repeats": _REPEATS.value, "l2_clip_norm": _CLIP_NORM.value}
    # Before JAX takes the device's memory.
    torch = measure_torch(_MODEL.value, **given, **settings, progress=_progress) if _TORCH.value else None
    workload = make_workload(_MODEL.value, **given, flash_attention=_FLASH.value, remat=_REMAT.value)
    if _UPDATES.value:
        size = None if sizes[0] == _BATCH_SIZE.value else sizes[0]
        updates = measure_updates(workload, _UPDATES.value, **settings, microbatch_size=size, progress=_progress)
        measured: dict[str, Any] = {"updates": updates}
    else:
        budget = _BUDGET.value * 1e9 if _BUDGET.value else 0.9 * machine.free_memory()
        measured = measure(workload, _ARMS.value, **settings, sizes=sizes, memory_budget=budget, progress=_progress)
    return {
        "model": _MODEL.value,
        "dtype": _DTYPE.value,
        "shapes": sequences | workload.shapes(),
        **settings,
        "command": " ".join(
            ["python -m experiments.benchmarks.step.main", *(a for a in sys.argv[1:] if "--results" not in a)]
        ),
        "machine": machine.description(),
        "versions": machine.versions(_PACKAGES),
        **measured,
        "torch": torch,
    }


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main)
