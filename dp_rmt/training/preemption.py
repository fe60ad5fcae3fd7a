"""A run that gets SIGTERM, with which schedulers announce that they take the machine, finishes its step and saves."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code that a shell reports for a program that SIGTERM ended: schedulers see that the run is not finished."""


class Preempted(SystemExit):
    """The run was stopped by SIGTERM and saved, as the log says. Uncaught, it ends the program with `EXIT_CODE`."""

    def __init__(self, name: str, step: int, num_steps: int):
        super().__init__(EXIT_CODE)
        logging.warning(
            "%s: stopped by SIGTERM after step %d of %d, which is saved; run the same command again: it goes on from "
            "there",
            name,
            step,
            num_steps,
        )


class Preemption:
    """Notices SIGTERM while its block runs; outside, the signal does what it did before.

    Of several processes each may get the signal at another moment or not at all. JAX's preemption service makes them
    stop after the same step.
    """

    def __enter__(self) -> Preemption:
        self._came = False
        self._before: Any = None
        # With several processes the service has its own handler. Outside the main thread Python allows no handler.
        self._installs = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._installs:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installs:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def came(self, step: int) -> bool:
        """Whether to stop after this step; all processes ask once in each step and get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._came

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self._came = True
