"""The installed program, ``dp-rmt COMMAND ...``. It is a door, so flags are allowed here.

``dp-rmt finetune``, ``sweep`` and ``spent`` are the same code as ``python -m experiments.finetune``,
``experiments.sweep`` and ``experiments.spent``, and ``dp-rmt audit`` as ``python -m experiments.audit --workdir=...``.
Modules that load JAX are imported once the command line is known to be right, so that a mistake in it is answered at
once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from dp_rmt import environment
from dp_rmt.finetuning import broken_pipe, command_line, shorthand
from dp_rmt.finetuning.settings import Settings

if TYPE_CHECKING:
    from dp_rmt.finetuning.door import Finetuned

INSTALLED = ("-m", "dp_rmt.finetuning.console", "finetune")
"""The arguments of Python with which a sweep runs a job."""


def main() -> None:
    """The console script: prepares the process and runs the command."""
    environment.prepare()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        names = "\n".join(f"  dp-rmt {name:9} {(do.__doc__ or '').splitlines()[0]}" for name, do in COMMANDS.items())
        usage = f"usage: dp-rmt COMMAND ...\n{names}\n`dp-rmt COMMAND --help` lists what a command takes."
        if command in ("-h", "--help", "help"):
            with broken_pipe.ending_quietly():
                print(usage)
            sys.exit(0)
        sys.exit(f"dp-rmt: there is no command {command!r}\n{usage}")
    COMMANDS[command]([f"dp-rmt {command}", *sys.argv[2:]])


def finetune(argv: list[str]) -> None:
    """Fine-tunes a model privately: settings in, a model, its report and its privacy statement out."""
    flags.DEFINE_string("model", None, "In place of --config: folder of a model, or its name on the hub.")
    flags.DEFINE_string("train", None, "In place of --config: a file of rows, a folder of such, hub:NAME, or a task.")
    flags.DEFINE_float("epsilon", None, "In place of --config: the privacy budget.")
    flags.DEFINE_string("workdir", None, "Folder of the run's files; default runs/<name of the settings>.")
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "For several processes: host:port of the first; auto on TPU pods, Slurm, Open MPI.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes, each with the same command.")
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
    command_line.run_with_settings(_finetune, argv, default=_short_settings)


def evaluate(argv: list[str]) -> None:
    """Evaluates the model of a finished or stopped run again, and prints its scores as JSON."""
    _ask(argv, lambda model: json.dumps(dict(model.scores), indent=1))


def generate(argv: list[str]) -> None:
    """Lets the model of a finished or stopped run write a text for every line, and prints them as JSON lines."""
    flags.DEFINE_string("prompts", "-", "A text file with a prompt in each line; - reads the standard input.")

    def answer(model: Finetuned) -> str:
        prompts = [line for line in _lines(flags.FLAGS.prompts) if line.strip()]
        written = model.generate(prompts)
        return _json_lines({"prompt": prompt, "text": text} for prompt, text in zip(prompts, written, strict=True))

    _ask(argv, answer, writes=True)


def predict(argv: list[str]) -> None:
    """Lets the model of a finished or stopped run classify every line, and prints the classes as JSON lines."""
    flags.DEFINE_string(
        "texts", "-", "A text file with a text in each line, or two with a tab between for pairs; - is standard input."
    )

    def answer(model: Finetuned) -> str:
        rows = [line.split("\t") for line in _lines(flags.FLAGS.texts) if line.strip()]
        found = model.predict_rows(rows)
        return _json_lines({"texts": row, "prediction": name} for row, name in zip(rows, found, strict=True))

    _ask(argv, answer, writes=False)


def report(argv: list[str]) -> None:
    """Writes report.html again from what is in a run's folder, and prints its tables."""
    _define_workdir()

    def run() -> str:
        from dp_rmt.finetuning import arms

        return arms.report(Path(flags.FLAGS.workdir))

    _run(run, argv)


def sweep(argv: list[str], program: Sequence[str] = INSTALLED) -> None:
    """Runs many runs that differ in some settings, restartable, with one table and one plot.

    Args:
      argv: the command and its arguments.
      program: the arguments of Python with which it runs a job.
    """
    flags.DEFINE_string("sweep", None, "The file of the sweep, such as one of configs/sweeps/.", required=True)
    flags.DEFINE_enum("executor", "local", ["local", "submitit", "print"], "What launches the jobs.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; default runs/sweeps/NAME.")
    flags.DEFINE_integer("jobs_at_once", None, "For local; default one for two cores, or per GPU.", lower_bound=1)
    flags.DEFINE_string("target", "gcloud", "For print: gcloud, xpk or skypilot.")
    flags.DEFINE_multi_string("launch", [], "KEY=VALUE for submitit or print; docs/launch.md lists them.")
    settings = [argument for argument in argv[1:] if argument.startswith("--config.")]  # the jobs take these
    own = [argument for argument in argv if argument not in settings]

    def run() -> str | None:
        from dp_rmt.finetuning.sweep import commands, jobs, launch

        values = flags.FLAGS
        if values.target not in commands.TARGETS:
            raise ValueError(f"--target={values.target}: choose from {', '.join(commands.TARGETS)}")
        workdir = Path(values.workdir or f"runs/sweeps/{Path(values.sweep).stem}")
        options = launch.options_from(values.launch)
        loaded = jobs.load_sweep(values.sweep, workdir, settings)
        launch.check_jobs(loaded, workdir)
        launch.announce(loaded, workdir, prefix="# " if values.executor == "print" else "")
        if values.executor == "print":
            launch.print_missing(loaded, workdir, ("python", *program), target=values.target, options=options)
            return None
        given = {"by": values.executor, "jobs_at_once": values.jobs_at_once, "options": options, "cwd": Path.cwd()}
        if not launch.run_missing(loaded, workdir, (sys.executable, *program), **given):
            sys.exit(1)
        return None

    _run(run, own)


def audit(argv: list[str]) -> None:
    """Attacks runs with the noise, sampling and updates of a run, and bounds its epsilon from below."""
    _define_workdir()
    flags.DEFINE_integer("runs", 24_000, "Number of runs with the canary, and again without it.", lower_bound=20)
    flags.DEFINE_integer("seed", 0, "Seed of sampling and noise.")

    def run() -> str:
        from dp_rmt.auditing.run_folder import audit_workdir
        from dp_rmt.reporting.numbers import number

        values = flags.FLAGS
        bound = audit_workdir(Path(values.workdir), num_runs=values.runs, seed=values.seed)
        epsilon, delta = number(bound.epsilon, "down"), number(bound.delta)
        return f"epsilon is at least {epsilon} at delta {delta}: see {values.workdir}/privacy.md"

    _run(run, argv)


def push(argv: list[str]) -> None:
    """Uploads a model, or an adapter, to the Hugging Face hub, unless a private file lies beside it."""
    flags.DEFINE_string("folder", None, "The folder to upload: model/ or adapter/ of a run.", required=True)
    flags.DEFINE_string("repo", None, "Name on the hub, as ORGANISATION/NAME.", required=True)
    flags.DEFINE_bool("public", False, "Makes a new repository public; without it only its members see it.")

    def run() -> str:
        from dp_rmt.finetuning.release.push import push as upload

        values = flags.FLAGS
        return upload(Path(values.folder), values.repo, is_public=values.public)

    _run(run, argv)


def spent(argv: list[str]) -> None:
    """Says what several runs on the same data have spent together."""
    flags.DEFINE_list("workdirs", None, "Folders of runs on the same data, with commas between.", required=True)

    def run() -> str:
        from dp_rmt.finetuning.sweep.spending_table import spent_together

        return spent_together([Path(folder) for folder in flags.FLAGS.workdirs])

    _run(run, argv)


def doctor(argv: list[str]) -> None:
    """Prints versions, devices and memory, and tests noise, clipping and accounting in ten seconds."""

    def run() -> str:
        from dp_rmt.finetuning.doctor import examine

        text, passed = examine()
        if not passed:
            print(text)
            sys.exit(1)
        return text

    _run(run, argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "finetune": finetune,
    "sweep": sweep,
    "audit": audit,
    "evaluate": evaluate,
    "generate": generate,
    "predict": predict,
    "report": report,
    "push": push,
    "spent": spent,
    "doctor": doctor,
}


def _define_workdir() -> None:
    flags.DEFINE_string("workdir", None, "Folder of a run, or of a copy.", required=True)


def _ask(argv: list[str], answer: Callable[[Finetuned], str], *, writes: bool | None = None) -> None:
    """Prints what the model of a run answers, asked with the settings on the command line in the place of its own.

    Args:
      argv: the command and its arguments.
      answer: gives the text to print.
      writes: whether the command is for decoders, or for the others; None for all. It is checked before any is loaded.
    """
    _define_workdir()
    flags.DEFINE_string("arm", None, "Which arm; may be left out where there is one.")
    try:
        argv, assignments = command_line.split(argv)
    except ValueError as error:
        command_line.stop(error)

    def change(settings: Settings) -> Settings:
        if writes is not None and writes != (settings.model.head == "causal_lm"):
            what, command = ("writes no text", "predict") if writes else ("does not classify", "generate")
            raise ValueError(f"the model of this run {what}: use `dp-rmt {command}`")
        return command_line.changed(settings, assignments)

    def run() -> str:
        from dp_rmt.finetuning.door import asked_again

        return answer(asked_again(Path(flags.FLAGS.workdir), flags.FLAGS.arm, change))

    _run(run, argv)


def _lines(path: str) -> list[str]:
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    return text.splitlines()


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _run(command: Callable[[], str | None], argv: list[str]) -> None:
    """Prints the result of a command; mistakes in the input end it with one clear line."""

    def call(rest: list[str]) -> None:
        _refuse(rest)
        try:
            text = command()
        except (ValueError, OSError, RuntimeError) as error:
            command_line.stop(error)
        if text is not None:
            print(text)

    command_line.run(call, argv)


def _short_settings() -> Settings:
    values = flags.FLAGS
    if values.model is None or values.train is None:
        raise ValueError(
            "give --config=FILE.py, or --model=..., --train=... and --epsilon=...; --help lists all settings"
        )
    if values.epsilon is None:
        raise ValueError("give --epsilon=..., the privacy budget; there is no default that is right for everybody")
    return shorthand.started(values.model, values.train, values.epsilon)


def _finetune(settings: Settings, rest: list[str]) -> None:
    """Prepares, trains and reports; mistakes in the input end it before training, with one clear line."""
    _refuse(rest)
    values = flags.FLAGS
    if values.config is None:
        settings = shorthand.completed(settings)
    for name, key in {"model": "model.path", "train": "data.path", "epsilon": "privacy.epsilon"}.items():
        if values.config is not None and values[name].present:
            sys.exit(f"--{name} is given in place of --config, not beside it: give --config.{key}=...")
    from dp_rmt.finetuning import arms
    from dp_rmt.training import processes

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
            if processes.is_first():
                print(arms.report(workdir))
        except OSError as error:  # a full disk: no mistake in the program, and the run can go on
            command_line.stop(error)


def _refuse(rest: list[str]) -> None:
    if len(rest) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(rest[1:])}; flags begin with --")


if __name__ == "__main__":
    main()
