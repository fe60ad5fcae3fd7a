"""Runs what is missing of the parts a to e for at most so many minutes; the same command again continues.

    experiments/benchmarks/gpu.sh [--minutes=9] [--rehearse]

Every job is a process of its own. After each, the JSON file of its part is written whole, with the name of the device.
What is missing for a job (a peer's package, a model, data) is said in one line, and the job skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from dp_rmt.finetuning import command_line
from experiments.benchmarks.gpu import runner
from experiments.benchmarks.gpu.jobs import PARTS, Job, Places, all_jobs
from experiments.benchmarks.gpu.records import CUT, ENDED, FAILED, PartRecords

ROOT = Path(__file__).parents[3]
_MINUTES = flags.DEFINE_float("minutes", 9.0, "Ends before so many minutes are over.", lower_bound=0.0)
_REHEARSE = flags.DEFINE_bool("rehearse", False, "Tiny sizes on the CPU: does everything run?")
_PARTS = flags.DEFINE_list("parts", list(PARTS), "Only these parts, or jobs: a,c/tiny.")
_AGAIN = flags.DEFINE_bool("again", False, "Also jobs that failed, were skipped, or were too long.")
_RESULTS = flags.DEFINE_string("results", "runs/gpu", "Folder of the results; those of a device lie in a folder in it.")
_WORK = flags.DEFINE_string("work", None, "Folder of checkpoints, logs and compiled programs; default RESULTS/work.")
_MODELS = flags.DEFINE_string("models", str(ROOT.parent / "models"), "Folder that has minilm and the decoder.")
_DATA = flags.DEFINE_string("data", str(ROOT.parent / "data"), "Folder that has sst2 and e2e, and perhaps tokens.")
_DECODER = flags.DEFINE_string("decoder", "stories260k", "Folder of the decoder in --models.")

_DEVICE = """
import json
from dp_rmt.reporting import machine
names = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch", "opacus", "jax-privacy", "dp_rmt")
print(json.dumps({"machine": machine.description(), "versions": machine.versions(names)}))
"""


def main(argv: list[str]) -> None:
    """Runs jobs until none is left, the time is over, or a signal comes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    clock = runner.Clock(60 * _MINUTES.value)
    try:
        places = Places(Path(_MODELS.value).absolute(), Path(_DATA.value).absolute(), _DECODER.value)
        jobs = _chosen(all_jobs(places, rehearse=_REHEARSE.value), _PARTS.value)
        environment = _environment()
        device = _device(environment)
        kind = re.sub(r"\W+", "-", device["machine"]["device_kind"]).lower()
        folder = Path(_RESULTS.value).absolute() / (f"rehearsal-{kind}" if _REHEARSE.value else kind)
        work = Path(_WORK.value).absolute() if _WORK.value else folder / "work"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
        records = PartRecords(folder, {"rehearsal": _REHEARSE.value, **device})
        with runner.locked(work / "lock") as lock:
            runner.run_all(jobs, records, clock, work, environment, lock, again=_AGAIN.value)
    except (ValueError, OSError, RuntimeError) as error:
        command_line.stop(error)
    sys.exit(_summary(jobs, records))


def _chosen(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs that are named, by their part or by themselves."""
    known = [*PARTS, *(job.name for job in jobs)]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--parts={','.join(unknown)} is unknown; choose among {', '.join(known)}")
    return [job for job in jobs if {job.part, job.name} & set(names)]


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(ROOT)
    environment["HF_HUB_OFFLINE"] = "1"
    if _REHEARSE.value:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = " ".join([environment.get("XLA_FLAGS", ""), *_quick_to_compile()]).strip()
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    else:
        # The CPU stays beside the GPU, to compare with. Nothing falls back to it.
        environment.setdefault("JAX_PLATFORMS", "cuda,cpu")
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    return environment


def _quick_to_compile() -> list[str]:
    """Flags of XLA for the CPU: compiling takes nearly all of a rehearsal's time."""
    flags_ = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag that they no longer have
        flags_.append("--xla_cpu_use_fusion_emitters=false")
    return flags_


def _device(environment: dict[str, str]) -> dict[str, Any]:
    """The machine and the versions, from a process of its own: this one must not take the GPU's memory."""
    command = [sys.executable, "-c", _DEVICE]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(
            f"JAX finds no device for JAX_PLATFORMS={environment['JAX_PLATFORMS']}; without a GPU, --rehearse runs "
            f"everything with tiny sizes. It says: {ended.stderr.strip().rpartition(chr(10))[2]}"
        )
    return json.loads(ended.stdout.splitlines()[-1])


def _summary(jobs: list[Job], records: PartRecords) -> int:
    """Prints what is done and what is left; 0 if nothing is left and nothing failed, 1 if a job failed, else 3."""
    states = {job.name: records.job(job.name)["status"] for job in jobs}
    left = [name for name, status in states.items() if status not in ENDED]
    failed = [name for name, status in states.items() if status == FAILED]
    print(f"{len(states) - len(left)} of {len(states)} jobs have ended; records: {os.path.relpath(records.folder)}")
    if failed:
        print(f"Failed: {', '.join(failed)}. Reasons are in the records, logs in the work folder; --again tries again.")
    if left:
        cut = [name for name in left if states[name] == CUT]
        print(f"Left: {', '.join(left)}" + (f" (cut off: {', '.join(cut)})" if cut else ""))
        print("The same command goes on from here.")
    return 3 if left else int(bool(failed))


if __name__ == "__main__":
    command_line.run(main)
