"""What all tests share: JAX on the CPU, no network."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
from pathlib import Path

# Before anything imports jax or a Hugging Face library, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # none: a test compiles what it tests
# Compiling takes most of the time of these tests: LLVM's optimisations, the splitting of small programs into parts, and
# the newer of two ways to emit a fused loop. Without them the last bit of a float32 can differ, nothing else.
_QUICK = {"--xla_backend_optimization_level": "0", "--xla_cpu_parallel_codegen_split_count": "1"}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag that they no longer have
    _QUICK["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _QUICK.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

from dp_rmt import environment  # noqa: E402

environment.prepare()


# JAX makes so many objects as it traces that looking for cycles among them takes an eighth of its time by default.
gc.set_threshold(200_000, 20, 20)


def pytest_collection_finish() -> None:
    """What has been imported stays: it need not be looked through again."""
    gc.freeze()


def pytest_xdist_auto_num_workers(config) -> int:
    """Of `-n auto`, which pyproject.toml gives: none for one file, which is sooner done without a start of their own.

    More than four do not pay: each imports JAX, and holds what it has compiled.
    """
    paths = {Path(argument.partition("::")[0]) for argument in config.args}
    one_file = len(paths) == 1 and all(path.suffix == ".py" for path in paths)
    return 0 if one_file else min(4, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
