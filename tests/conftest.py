"""What all tests share: JAX on the CPU, no network."""

from __future__ import annotations

import importlib.metadata
import os

# Before anything imports jax or a Hugging Face library, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
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
