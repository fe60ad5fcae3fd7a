"""What all tests share: JAX on the CPU, no network."""

from __future__ import annotations

import os

# Before anything imports jax or a Hugging Face library, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
