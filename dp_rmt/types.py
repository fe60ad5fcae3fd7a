"""Type aliases that every floor shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = Any
"""A pytree of arrays: the parameters that are trained, or anything shaped like them (gradients, updates)."""

Batch = Any
"""A pytree of arrays that share their leading axis, the examples of one batch."""

PerExampleLosses = Callable[[Params, Batch], jax.Array]
"""``(params, batch) -> (batch,)``: one loss per example; no example may influence another's loss."""

Metrics = Mapping[str, Any]
"""Names to scalars or small arrays; whatever was computed from raw private values is named ``nonprivate/...``."""
