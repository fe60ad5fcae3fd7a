"""A run that is asked to stop finishes its step and saves.

Ctrl-C asks it, or SIGTERM, with which schedulers announce that they take the machine.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code that a shell reports for a program that SIGTERM ended: schedulers see that the run is not finished."""
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Preempted(SystemExit):
    """The run was stopped and saved, as the log says. Uncaught, it ends the program with the signal's exit code."""

    def __init__(self, name: str, step: int, num_steps: int, by: int = signal.SIGTERM):
        super().__init__(128 + by)
        logging.warning(
            "%s: stopped by %s after step %d of %d, which is saved; run the same command again: it goes on from there",
            name,
            _NAMES[signal.Signals(by)],
            step,
            num_steps,
        )


class Preemption:
    """Notices Ctrl-C and SIGTERM while its block runs; outside, the signals do what they did before.

    A second Ctrl-C ends the process at once, with exit code 130. What was saved before is whole, as after SIGKILL.

    Of several processes each may get SIGTERM at another moment or not at all. JAX's preemption service makes them
    stop after the same step. Ctrl-C does there what it does in any program.
    """

    def __enter__(self) -> Preemption:
        self.by: int = signal.SIGTERM
        self._came = False
        self._before: dict[int, Any] = {}
        # With several processes the service has its own handler. Outside the main thread Python allows no handler.
        self._installs = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._installs:
            self._before = {number: signal.signal(number, self._note) for number in _NAMES}
            self._watch = _Watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installs:
            self._watch.close()
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)

    def came(self, step: int) -> bool:
        """Whether to stop after this step; all processes ask once in each step and get the same answer."""
        if jax.process_count() > 1:
            self._came = multihost_utils.reached_preemption_sync_point(step)
        return self._came

    @property
    def was_noticed(self) -> bool:
        """Whether the run has to stop: `came` has said so, or a signal has come since it was asked last.

        Several processes may not look between two steps, where they would not agree.
        """
        return self._came

    def _note(self, number: int, frame: Any) -> None:
        del frame
        if not self._came:
            self._came, self.by = True, number


class _Watch:
    """A thread that sees each signal when it comes; a handler in Python waits until XLA has compiled."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def _run(self) -> None:
        presses = 0
        while numbers := os.read(self._read, 64):
            for _ in range(numbers.count(signal.SIGINT)):
                presses += 1
                if presses > 1:
                    os._exit(128 + signal.SIGINT)
                print(
                    "\nCtrl-C: finishing this step and saving; press Ctrl-C again to end at once",
                    file=sys.stderr,
                    flush=True,
                )
