"""What all tests share: JAX on the CPU, no network."""

from __future__ import annotations

import os

# Before anything imports jax or a Hugging Face library, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compiling takes most of the time of these tests, and LLVM's optimisations most of that; without them the last bit of a
# float32 can differ, nothing else.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_LEVEL}=0".strip()

import experiments  # noqa: E402, F401  (one thread for BLAS, the parts of a program in order: see its docstring)
