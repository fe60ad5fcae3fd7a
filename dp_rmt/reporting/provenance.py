"""What a statement is about: the base model, the task, the data, the code and the command of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEED = re.compile(r"(-{1,2}[\w.]*_seed)(=.*)?", re.DOTALL)
HIDDEN = "(given; not shown)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was trained, on what, by which code; every field may be unknown.

    Attributes:
      base_model: folder or name of the pre-trained model.
      task: name of the training task.
      tuning: which part of the model trains.
      data_fingerprint: fingerprint of the training data, keyed (`keyed_fingerprint`).
      version: version of dp_rmt.
      commit: commit of the checkout that dp_rmt was run from; None where it runs from no checkout.
      command: the command line, without the seeds of sampling and noise.
    """

    base_model: str | None = None
    task: str | None = None
    tuning: str | None = None
    data_fingerprint: str | None = None
    version: str | None = None
    commit: str | None = None
    command: str | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Provenance:
        """Reads the fields that are known and ignores others, so that files of other versions can be read."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in names})


def of_this_process(**facts: str | None) -> Provenance:
    """The given facts, with the version, commit and command of the running program."""
    return Provenance(version=version(), commit=commit(), command=command_line(), **facts)


def version() -> str | None:
    """The version of dp_rmt in the metadata of its installation; None where there are none."""
    try:
        return importlib.metadata.version("dp_rmt")
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The git commit of the checkout whose top has the package, with "+changes" if tracked files differ from it.

    Args:
      package: folder of the package.

    Returns:
      None without git, outside a checkout, or inside the checkout of another project.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve():
            return None
        git("ls-files", "--error-unmatch", f"{package.name}/__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command that runs, as a shell takes it, without its seeds: whoever knows them can subtract the noise.

    >>> command_line(["train.py", "--config.privacy.noise_seed=7", "--config.privacy.sampling_seed", "8", "--x=a b"])
    "train.py '--config.privacy.noise_seed=(given; not shown)' --config.privacy.sampling_seed '(given; not shown)' '--x=a b'"
    """  # noqa: E501
    program, *arguments = sys.argv if argv is None else argv
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = [Path(program).name]
    if argv is None and module is not None:
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    hides = False
    for argument in arguments:
        found = SEED.fullmatch(argument)
        if found is not None:
            words.append(found[1] + (f"={HIDDEN}" if found[2] is not None else ""))
        else:
            words.append(HIDDEN if hides else argument)
        hides = found is not None and found[2] is None
    return shlex.join(words)


def keyed_fingerprint(run: str, fingerprint: str) -> str:
    """HMAC-SHA256 of the fingerprint of a data set under a run's secret id, in 32 hexadecimal digits.

    A bare digest beside a released model would be an exact function of the data: whoever knows all examples but one
    could try guesses of the last. Only those who have the run's `ledger.jsonl` can try guesses on this one.

    >>> keyed_fingerprint("0" * 32, "1" * 64)
    '184aa6d8ec57712c80a4bd990f38309d'
    """
    return hmac.new(run.encode(), fingerprint.encode(), hashlib.sha256).hexdigest()[:32]
