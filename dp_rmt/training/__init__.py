"""One private step, the loop around it, and `prepare_run`, the middle door for a model and data of one's own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_rmt.training.guarantee import About
    from dp_rmt.training.prepare import Seeds, prepare_run
    from dp_rmt.training.run import Run
    from dp_rmt.training.task import Task
    from dp_rmt.training.train_state import Transforms

__all__ = ["About", "Run", "Seeds", "Task", "Transforms", "prepare_run"]

_HOMES = {"About": "guarantee", "Run": "run", "Task": "task", "Transforms": "train_state"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: the modules here must not wait for Orbax, which the run needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'prepare')}"), name)
