"""The environment variables that a program on the CPU wants, which must be set before NumPy and JAX are loaded.

Importing dp_rmt sets none of them. A program calls `prepare` first of all: the console script does, and so does
everything that runs as ``python -m experiments.NAME``. In a notebook or a script of your own, begin with

    from dp_rmt import environment

    environment.prepare()

- OpenBLAS gets one thread. XLA calls LAPACK from threads of its own, and when both have many threads, an
  eigendecomposition takes ten times as long.
- XLA runs the parts of a program in order. jaxlib 0.10.2 hangs for ever where LAPACK calls of one program overlap. The
  transforms of dp_rmt decompose one matrix group after the other and are safe without it; code beside them may not be
  (docs/sharp_edges.md).
- JAX keeps what it has compiled in ``~/.cache/dp_rmt/xla``, so that a program which is run again compiles nothing. A
  program can hold what a loss closes over; the folder is therefore open to its owner alone. Give
  JAX_COMPILATION_CACHE_DIR for another folder, or an empty one for none.
- XLA writes no errors of its own to the terminal, such as its "Very slow compile?" with stars around it; those that
  matter are raised. TF_CPP_MIN_LOG_LEVEL=0 shows all.
- transformers does not complain that there is no torch: its tokenizers and configs are all that dp_rmt uses.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def prepare() -> None:
    """Sets what is missing of the variables above, for this process and those that it starts.

    What the user has set is left alone. A warning says so if JAX or NumPy was loaded before, since each reads its
    variable only once.
    """
    late = []
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        late += [name for name in ("numpy",) if name in sys.modules]
    if IN_ORDER not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {IN_ORDER}=false".strip()
        late += [name for name in ("jax",) if name in sys.modules]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (cache := _private_cache()) is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    if late:
        warnings.warn(
            f"dp_rmt.environment.prepare() was called after {' and '.join(late)} had been imported, which may have "
            "read their environment variables already. Call it first of all.",
            RuntimeWarning,
            stacklevel=2,
        )


def _private_cache() -> Path | None:
    """A folder for compiled programs that only its owner can read; None where there is no place for it."""
    try:
        folder = Path("~/.cache/dp_rmt/xla").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # a home that cannot be written, or none
        return None
    return folder


def unprepared() -> str | None:
    """What a library's function may tell its caller who has not called `prepare`; None if there is nothing to tell.

    Only JAX on the CPU is touched. The question starts JAX's backend if it has not started yet.
    """
    missing = [] if "OPENBLAS_NUM_THREADS" in os.environ else ["OPENBLAS_NUM_THREADS=1"]
    if IN_ORDER not in os.environ.get("XLA_FLAGS", ""):
        missing.append(f"XLA_FLAGS={IN_ORDER}=false")
    if not missing:
        return None
    import jax  # here, because `prepare` must come before JAX

    if jax.default_backend() != "cpu":
        return None
    return (
        f"JAX runs on the CPU without {' and without '.join(missing)}: decompositions can be ten times slower, and two "
        "of them at once can hang (docs/sharp_edges.md). Restart Python and begin with `from dp_rmt import "
        "environment; environment.prepare()`, before JAX is imported."
    )
