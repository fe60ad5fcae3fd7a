"""Writes down what a run is about to release, before it exists: a line of the ledger, then the statement."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement
from dp_rmt.training.ledger import Entry, Ledger, now


class Releases:
    """What a run has released and may release, on the disk at every moment.

    The updates of a run are announced in stretches: before the first update of a stretch is computed, ledger and
    statement name the last update of the stretch. Whatever kills the run then, they bound what it did. A run that
    stops in good order replaces the bound by the exact number. A run that resumes repeats the updates after its
    checkpoint bit by bit, noise included, which releases nothing new. The bound stays until the run goes beyond it.

    The statement of the next stretch is computed in a thread while this one runs: epsilon takes up to a second.

    Args:
      workdir: the run's folder, of which this process is the only writer.
      entry: what the ledger is to say of this run; its `updates` are those of the checkpoint that the run goes on from.
      statement: gives the statement after so many updates; `Releases` adds what the ledger knows.

    Raises:
      ValueError: the ledger is broken.
      FileExistsError: the ledger is another run's.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], entry: Entry, statement: Callable[[int], PrivacyStatement]
    ) -> None:
        self._workdir, self._entry, self._statement = workdir, entry, statement
        self._ledger = Ledger(workdir)
        self._ledger.check_run(entry.run)
        self._thread = ThreadPoolExecutor(1, "statement")
        self._next: tuple[int, Future[PrivacyStatement]] | None = None
        if self.bound < entry.updates:  # a run from before there were ledgers may have gone beyond its checkpoint
            self._append(entry.updates, is_exact=entry.updates == entry.num_steps)
        self._before, self._before_is_exact = self.bound, self._holds.is_exact
        self._write()

    @property
    def bound(self) -> int:
        """No more updates than this have been released."""
        return self._holds.updates

    def announce(self, updates: int, then: int | None = None) -> None:
        """Returns when ledger and statement say that so many updates may be released.

        Args:
          updates: updates since the run began; a number up to the bound is announced already.
          then: the number that will be announced next; its statement is prepared meanwhile.

        Raises:
          OSError: ledger or statement could not be written; the updates must not be computed then.
        """
        if updates > self.bound:
            self._append(updates, is_exact=False)
            self._write()
        if then is not None and then > self.bound:
            self._next = then, self._thread.submit(self._statement, then)

    def stopped(self, updates: int) -> None:
        """Says how far a run came that stopped in good order; it must be the last call.

        If an earlier process was killed after it had announced more, the bound of that process stays.

        Args:
          updates: updates since the run began.

        Raises:
          OSError: ledger or statement could not be written; the bound stays.
        """
        found = (updates, True) if updates >= self._before else (self._before, self._before_is_exact)
        if found != (self.bound, self._holds.is_exact):
            self._append(found[0], is_exact=found[1])
        self._write()
        self._thread.shutdown()

    @property
    def _holds(self) -> Entry:
        return self._ledger.last or dataclasses.replace(self._entry, updates=0, is_exact=True)

    def _append(self, updates: int, *, is_exact: bool) -> None:
        self._ledger.append(dataclasses.replace(self._entry, updates=updates, is_exact=is_exact, date=now()))

    def _write(self) -> None:
        """Writes the statement of the entry that holds."""
        entry = self._holds
        prepared = self._next is not None and self._next[0] == entry.updates
        statement = self._next[1].result() if self._next and prepared else self._statement(entry.updates)
        statement = dataclasses.replace(
            statement, is_upper_bound=not entry.is_exact, about=entry.about, date=entry.date
        )
        write_privacy(self._workdir, statement)
