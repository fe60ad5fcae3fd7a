"""The installed program, ``dp-rmt COMMAND ...``: a door, so that flags are allowed here.

``dp-rmt finetune`` is the same code as ``python -m experiments.finetune``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from dp_rmt import environment
from dp_rmt.finetuning import command_line
from dp_rmt.finetuning.settings import Settings


def main() -> None:
    """The console script: prepares the process and runs the command."""
    environment.prepare()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        names = "\n".join(f"  dp-rmt {name:9} {(do.__doc__ or '').splitlines()[0]}" for name, do in COMMANDS.items())
        usage = f"usage: dp-rmt COMMAND ...\n{names}\n`dp-rmt COMMAND --help` lists what a command takes."
        if command in ("-h", "--help", "help"):
            print(usage)
            sys.exit(0)
        sys.exit(f"dp-rmt: there is no command {command!r}\n{usage}")
    COMMANDS[command]([f"dp-rmt {command}", *sys.argv[2:]])


def finetune(argv: list[str]) -> None:
    """Fine-tunes a model privately: settings in, a model, its report and its privacy statement out."""
    flags.DEFINE_string("workdir", None, "Folder of the run's files; default runs/<name of the settings>.")
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "For several processes: host:port of the first; auto on TPU pods, Slurm, Open MPI.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes, each with the same command.")
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
    command_line.run_with_settings(_finetune, argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"finetune": finetune}


def _finetune(settings: Settings, rest: list[str]) -> None:
    """Prepares, trains and reports; mistakes in the input end it before training, with one clear line."""
    if len(rest) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(rest[1:])}; flags begin with --")
    # Only now: a mistake in the command line is answered before JAX is loaded.
    from dp_rmt.finetuning import arms
    from dp_rmt.training import processes

    values = flags.FLAGS
    workdir = Path(values.workdir or f"runs/{settings.name}")
    with processes.ending_together():
        try:
            processes.initialize(values.coordinator_address, values.num_processes, values.process_id)
            prepared = arms.prepare(settings, workdir)
        except (ValueError, OSError, RuntimeError) as error:
            command_line.stop(error)
        try:
            for arm in prepared:
                arms.train(arm)
        except OSError as error:  # a full disk: no mistake in the program, and the run can go on
            command_line.stop(error)
        if processes.is_first():
            print(arms.summary(prepared, workdir))
