"""What a user meets at the terminal: settings are read, mistakes end in one clear line, other libraries keep quiet.

Nothing here imports JAX, so that a mistyped key is answered before anything heavy is loaded.
"""

from __future__ import annotations

import importlib.util
import logging as python_logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from dp_rmt.finetuning import broken_pipe
from dp_rmt.finetuning.options import Group, check_name, described, group_of, kinds, parsed, walk
from dp_rmt.finetuning.settings import Settings, Synthetic

Assignment = tuple[str, str]
"""A dotted key and its value as text."""

_A_CONFIG = (
    "Give a Python file whose function get_config gives the settings that differ, as in {'privacy': {'epsilon': 3.0}}; "
    "a checkout of dp_rmt has some, such as --config=configs/quickstart.py"
)
_MISSING = re.compile(r"flag --(?P<name>\w+)=None: Flag --\w+ must have a value other than None")
_ASSIGNMENT = re.compile(r"--?config\.(?P<key>[\w.-]+)(=(?P<value>.*))?", re.DOTALL)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """`absl.app.run` for programs that have only flags; it logs no more than warnings unless --verbosity is given."""
    with broken_pipe.ending_quietly():
        app.run(
            _quietly(main),
            argv,
            flags_parser=lambda arguments: _parsed(arguments, _help_of_flags, _read_flags),
        )


def run_with_settings(
    main: Callable[[Settings, list[str]], None],
    argv: list[str] | None = None,
    *,
    default: Callable[[], Settings] | None = None,
) -> None:
    """Runs a program that takes settings: a file of them (--config=FILE) and changes (--config.KEY=VALUE).

    Args:
      main: gets the settings, and those arguments of the command line that are neither flags nor settings.
      argv: the program's name and its arguments; None takes those of the process.
      default: makes the settings to change where --config=FILE is missing; it is called once the flags are parsed.
        With None the file is required.
    """
    found: list[Settings] = []

    def parse(arguments: list[str]) -> list[str]:
        arguments, assignments = split(arguments)
        rest = _read_flags(arguments)
        found.append(read(flags.FLAGS.config, assignments, default))
        return rest

    flags.DEFINE_string("config", None, "A file of settings, FILE.py or FILE.py:CHOICE, with a function get_config.")
    with broken_pipe.ending_quietly():
        app.run(
            _quietly(lambda rest: main(found[0], rest)),
            argv,
            flags_parser=lambda arguments: _parsed(arguments, lambda: _help_of_flags() + _help_of_settings(), parse),
        )


def stop(error: Exception) -> NoReturn:
    """Ends the program with the message of an error; with --verbosity=1 the log also shows where it arose.

    Raises:
      BrokenPipeError: that is the error, and nobody reads what is printed (`broken_pipe.ending_quietly`).
    """
    if isinstance(error, BrokenPipeError) and broken_pipe.without_reader():
        raise error
    logging.debug("stopped", exc_info=error)
    text = str(error)
    if isinstance(error, OSError):
        from dp_rmt.files import explained  # here, because it loads NumPy, and a typo needs no more than its answer

        text = explained(error)
    sys.exit(f"{Path(sys.argv[0]).stem}: {text}")


def split(argv: Sequence[str]) -> tuple[list[str], list[Assignment]]:
    """Takes the settings out of a command line.

    Raises:
      ValueError: a setting has no value.

    >>> split(["finetune", "--config=a.py", "--config.privacy.epsilon=3", "--config.name", "b"])
    (['finetune', '--config=a.py'], [('privacy.epsilon', '3'), ('name', 'b')])
    """
    rest, assignments = [], []
    arguments = iter(argv)
    for argument in arguments:
        match = _ASSIGNMENT.fullmatch(argument)
        if match is None:
            rest.append(argument)
            continue
        value = match["value"] if match["value"] is not None else next(arguments, None)
        if value is None:
            raise ValueError(f"{argument} has no value: give {argument}=VALUE")
        assignments.append((match["key"], value))
    return rest, assignments


def read(
    config: str | None, assignments: Sequence[Assignment], default: Callable[[], Settings] | None = None
) -> Settings:
    """The settings of a file, changed as a command line says.

    Args:
      config: ``FILE.py`` or ``FILE.py:CHOICE``, whose function get_config gives a ConfigDict or nested dictionaries;
        None for the default.
      assignments: changes, in order.
      default: makes the settings where no file is given; with None the file is required.

    Raises:
      ValueError: a key is unknown or a value cannot be used.
      FileNotFoundError: there is no such file.
    """
    if config is None and default is None:
        raise ValueError(f"--config is missing. {_A_CONFIG}")
    settings = default() if config is None and default is not None else Settings.from_config(_called(config or ""))
    return changed(settings, assignments)


def changed(settings: Settings, assignments: Sequence[Assignment]) -> Settings:
    """The settings with the changes of a command line, in order.

    Raises:
      ValueError: a key is unknown or a value cannot be used.
    """
    for key, text in assignments:
        settings = _assigned(settings, key, text)
    return settings


def _parsed(arguments: list[str], help_text: Callable[[], str], parse: Callable[[list[str]], list[str]]) -> list[str]:
    """The result of `parse`; --help and mistakes end the program."""
    program = Path(arguments[0]).stem
    if any(argument in ("-h", "--help", "--helpshort", "--helpfull") for argument in arguments[1:]):
        print(f"usage: {program} [--FLAG=VALUE ...]\n\nflags:\n{help_text()}")
        sys.exit(0)
    try:
        return parse(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")


def _read_flags(arguments: list[str]) -> list[str]:
    """Reads the flags, and returns the other arguments.

    Raises:
      ValueError: a flag is unknown, cannot be used or is missing.
    """
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        if (missing := _MISSING.match(str(error))) is None:
            raise ValueError(f"{error} (--help lists the flags)") from error
        name = missing["name"]
        raise ValueError(f"--{name} is missing: give --{name}=... {flags.FLAGS[name].help}") from error


def _help_of_flags() -> str:
    """Help for the flags of this program, without those of absl."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = [flag for module, found in by_module.items() if not module.startswith("absl.") for flag in found]
    return "\n".join(
        f"  --{flag.name}{'' if flag.boolean else '=...'}\n{_indented(flag.help)}"
        for flag in sorted(own, key=lambda flag: flag.name)
    )


def _help_of_settings() -> str:
    """Help for every setting: its doc and its default."""
    defaults = Settings()
    lines = [
        f"  --config.{key}={_default(defaults, key)!r}\n{_indented(field.metadata['doc'] + _choices(kind))}"
        for key, kind, field in walk(Settings)
    ]
    return "\n".join(["\n\nsettings, with their defaults:", *lines])


def _default(defaults: Settings, key: str) -> Any:
    found: Any = defaults
    for part in key.split("."):
        found = Synthetic() if found is None else found
        found = getattr(found, part)
    return found


def _choices(kind: Any) -> str:
    words = described(kind)
    return f" {words[0].upper()}{words[1:]}." if "one of" in words else ""


def _indented(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def _called(config: str) -> Any:
    """The result of a file's get_config, which is called as ml_collections calls it."""
    path, _, choice = config.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={config}: there is no file {path!r}. {_A_CONFIG}")
    if (root := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, root)  # as `python -m` does: the configs of a checkout import each other
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None  # for any file that exists
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={config}: the file has no function get_config")
    return module.get_config(choice) if choice else module.get_config()


def _assigned(settings: Settings, key: str, text: str) -> Settings:
    """The settings with one key changed; a key that begins with ``arms.NAME.`` is one of that arm's changes."""
    if not key.startswith("arms."):
        return settings.changed({key: parsed(_kind(Settings, key, "config"), text, f"config.{key}")})
    _, name, rest = (*key.split(".", 2), "")[:3]
    if name not in settings.arms:
        raise ValueError(f"config.{key}: there is no such arm; choose from {', '.join(settings.arms) or 'none'}")
    value = parsed(_kind(Settings, rest, f"config.arms.{name}"), text, f"config.{key}")
    changes = dict(settings.arms[name])
    inside = changes
    *groups, last = rest.split(".")
    for each in groups:
        inside[each] = inside = dict(inside.get(each, {}))
    inside[last] = value
    return settings.changed({"arms": {**settings.arms, name: changes}})


def _kind(of: type[Group], key: str, where: str) -> Any:
    """The type of the option that a dotted key names."""
    name, _, rest = key.partition(".")
    check_name(of, name, where)
    kind = kinds(of)[name]
    inner = group_of(kind)
    if not rest:
        return kind
    if inner is None:
        raise ValueError(
            f"{where}.{name} has no keys below it, such as {rest!r}; give --config.{name}=VALUE as a whole"
        )
    return _kind(inner, rest, f"{where}.{name}")


def _quietly(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def quiet(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:  # only here, because absl sets INFO after the flags are parsed
            logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(is_of_interest)
        try:
            main(argv)
        except KeyboardInterrupt:
            program = Path(sys.argv[0]).stem
            print(f"\n{program}: stopped by Ctrl-C; the same command begins again, or goes on", file=sys.stderr)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(128 + signal.SIGINT)  # at an ordinary end, what XLA still computes can end in a segmentation fault

    return quiet


def is_of_interest(record: python_logging.LogRecord) -> bool:
    """Whether a record of the log is for the user.

    dp_accounting warns of every Rényi order that it leaves out, but the bound by the other orders holds all the same.
    """
    return "_compute_log_a_frac failed to converge" not in str(record.msg)
