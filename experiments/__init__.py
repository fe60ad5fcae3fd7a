"""The experiments; each module runs as ``python -m experiments.NAME``.

Settings that must be made before the libraries load; the user's own values are left alone. Two are for JAX on the CPU:

- OpenBLAS has one thread: XLA runs LAPACK calls from threads of its own, and with both multi-threaded an
  eigendecomposition takes ten times as long.
- XLA runs the parts of a program in order: jaxlib 0.10.2 hangs when LAPACK calls of one program overlap
  (docs/sharp_edges.md).
"""

import os

# Tokenizers and configs are all that is used of transformers; it need not complain that there is no torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"
if _IN_ORDER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_IN_ORDER}=false".strip()
