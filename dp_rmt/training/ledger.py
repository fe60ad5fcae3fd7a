"""`ledger.jsonl`: what a run has released, or may have released, written down before it exists and never deleted.

An entry bounds the updates of the run from above: it is on the disk before the first of them is computed. The last
entry holds. Its number is smaller than the one before only where a process that stopped in good order says how far it
came. The file lies outside `checkpoints/`, so that the spending is remembered when the checkpoints are gone. It holds
no seed, no key and no digest of them. But the run's id and the fingerprint of the data confirm a guess of the whole
data, so keep it to yourself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dp_rmt import accounting
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.types import Unit

FILE = "ledger.jsonl"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks, such as a mounted bucket."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A run has done, or may come to do, this many updates of a mechanism on a data set.

    Attributes:
      run: random id of the run, kept in its checkpoints, too.
      updates: done since the run began; an upper bound unless `is_exact`.
      is_exact: whether the run stopped in good order after so many.
      noise_multiplier: this and the next fields are those of the mechanism (see `dp_rmt.mechanism.DPSGD`).
      l2_clip_norm: None for no clipping.
      sampling_probability: q.
      max_batch_size: a larger sample is cut.
      num_examples: N.
      num_steps: updates planned.
      delta: of the guarantee.
      seeds_from: as in `PrivacyStatement`.
      train_data: fingerprint of the training data.
      about: what else was known.
      date: when it was written, in UTC.
      unit: what N, the batch and the guarantee count: examples, or users.
      noise_bands: b of correlated noise, whose groups of examples take turns; 1 for independent noise.
    """

    run: str
    updates: int
    is_exact: bool
    noise_multiplier: float
    l2_clip_norm: float | None
    sampling_probability: float
    max_batch_size: int
    num_examples: int
    num_steps: int
    delta: float
    seeds_from: str
    train_data: str
    about: Provenance
    date: str
    unit: Unit = "example"
    noise_bands: int = 1

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Entry:
        """The entry in a line of the file.

        Unit and noise_bands may be missing: lines of earlier versions lack them, where they were "example" and 1.

        Raises:
          ValueError: the line is no object, or a field is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, Mapping):
            raise ValueError("not an object")
        if missing := names - {"unit", "noise_bands"} - record.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        values = {name: record[name] for name in names if name in record}
        return cls(**(values | {"about": Provenance.from_json(record["about"])}))

    def epsilon(self) -> float:
        """The epsilon that these updates spend, by privacy loss distributions; infinite without noise."""
        if self.updates == 0:
            return 0.0
        truncation = accounting.Truncation(self.num_examples, self.max_batch_size)
        run = accounting.AccountedRun(
            self.noise_multiplier,
            self.sampling_probability,
            self.updates,
            truncation,
            NOISE_SUPPORT,
            self.noise_bands,
        )
        return run.epsilon(self.delta)


class Ledger:
    """The ledger of one run's folder; only one process may append (see `only_writer`).

    Args:
      workdir: the run's folder.

    Raises:
      ValueError: a whole line is no entry.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self.path = Path(workdir) / FILE
        self.entries = read_ledger(workdir)

    @property
    def last(self) -> Entry | None:
        """The entry that holds."""
        return self.entries[-1] if self.entries else None

    def check_run(self, run: str | None) -> None:
        """Makes sure that what is about to be released belongs to the run of this ledger.

        Args:
          run: id in the checkpoint that the run goes on from; None where there is no checkpoint.

        Raises:
          FileExistsError: the ledger is another run's; the message says what was spent and what can be done.
        """
        last = self.last
        if last is not None and last.updates > 0 and last.run != run:
            reason = "its checkpoints are gone" if run is None else "the checkpoints there are those of another run"
            ways = ways_on(self.path.parent, seeds_given=last.seeds_from == "given in the config")
            raise FileExistsError(f"{self.path} says that {_spent(last)}, but {reason}. {ways}")

    def append(self, entry: Entry) -> None:
        """Writes a whole entry and returns when it is on the disk.

        A last line that a crash left unfinished is cut off first: nothing was released under it.

        Raises:
          OSError: the entry could not be written; nothing may be released then.
        """
        line = (json.dumps(dataclasses.asdict(entry), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            content = os.read(descriptor, os.fstat(descriptor).st_size)
            end = content.rfind(b"\n") + 1
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(self.path.parent)  # else a crash could take a new file with it
        self.entries.append(entry)


@contextlib.contextmanager
def only_writer(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a run's folder to this process while it trains there.

    Two processes that resumed the same run would each cut off what the other has written, and, before the first
    checkpoint, each draw a noise key of its own. The lock is the kernel's, on the ledger, which is made if it is
    missing; it ends with the process, however that ends.

    Args:
      workdir: the run's folder.

    Raises:
      BlockingIOError: another process trains there.
    """
    descriptor = os.open(Path(workdir) / FILE, os.O_RDWR | os.O_CREAT, 0o600)  # NFS locks only what is open for writing
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process trains in {workdir}: wait for its end or stop it; the same command then resumes"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.warning("%s: its file system has no locks; never train there from two processes", workdir)
        yield
    finally:
        os.close(descriptor)


def read_ledger(workdir: str | os.PathLike[str]) -> list[Entry]:
    """The entries in a run's folder, in the order of writing; none where there is no ledger.

    An unfinished last line is left out: the crash that cut it came before anything was released under it.

    Raises:
      ValueError: a whole line is no entry; the message names it.
    """
    path = Path(workdir) / FILE
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    entries = []
    for row, line in enumerate(lines, start=1):
        try:
            entries.append(Entry.from_json(json.loads(line)))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {row} is no entry of a ledger: {error}. It says what the data was spent on, so put "
                "the file back as it was; a new --workdir begins another ledger"
            ) from error
    return entries


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _spent(entry: Entry) -> str:
    most = "" if entry.is_exact else "up to "
    text = f"{most}{entry.updates:,} updates on {entry.num_examples:,} training {entry.unit}s were released"
    if entry.noise_multiplier == 0:
        return f"{text}, without any privacy"
    return f"{text}, for epsilon = {number(entry.epsilon(), 'up')} at delta = {number(entry.delta, 'up')}"


def ways_on(workdir: Path, *, seeds_given: bool) -> str:
    """What to do where a new run would spend the data a second time."""
    text = (
        "To begin again would spend the data a second time and overwrite the model of the first. Either put "
        f"{workdir / 'checkpoints'} back as they were, and the same command goes on from there; or give a new "
        f"--workdir and account for both runs: `dp-rmt spent --workdirs={workdir},NEW` says what they cost together."
    )
    if seeds_given:
        text += (
            " The seeds were given, so that a second run draws the same noise, which cancels out in the difference of "
            "the two: on data that is public or synthetic remove the whole folder instead, and release one run at most."
        )
    return text


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # mounted buckets have no folders to write back
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
