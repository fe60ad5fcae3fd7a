"""What a user meets at the terminal: wrong flags end in one clear line, and other libraries keep quiet."""

from __future__ import annotations

import logging as python_logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` for programs with the flag --config; quiet below warnings unless the user gives --verbosity."""

    def quietly(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:  # here, since absl makes it INFO after the flags are parsed
            logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(_is_of_interest)
        main(argv)

    app.run(quietly, flags_parser=_parse_flags)


def stop(error: Exception) -> NoReturn:
    """Ends the program with the message of an error; --verbosity=1 shows where it arose, too."""
    logging.debug("stopped", exc_info=error)
    sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def _parse_flags(argv: list[str]) -> list[str]:
    program = Path(argv[0]).stem
    try:
        rest = app.parse_flags_with_usage(argv)
        getattr(flags.FLAGS["config"].value, "name", None)  # raises if the file could not be read
    except (AttributeError, KeyError) as error:
        if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a mistake inside the config file
        sys.exit(f"{program}: {_unknown_key(str(error), argv)} All keys are in configs/base.py.")
    except OSError as error:
        reason = " ".join(str(error).split())
        sys.exit(f"{program}: {reason}. Give a file of configs/, such as --config=configs/quickstart.py.")
    return rest


def _unknown_key(message: str, argv: list[str]) -> str:
    """What ml_collections says of an unknown key, with the argument that has it."""
    key, suggestion = re.search(r"\w+", message), re.search(r"Did you mean[^?]*\?", message)
    assert key is not None  # every message begins with the key
    found = [argument for argument in argv if key[0] in argument.partition("=")[0].split(".")]
    unknown = f"names {key[0]!r}, which the config does not have."
    return " ".join([*found[:1], unknown, *([suggestion[0]] if suggestion else [])])


def _is_of_interest(record: python_logging.LogRecord) -> bool:
    # dp_accounting warns of every Renyi order that it leaves out; the bound by the others holds as it is.
    return "_compute_log_a_frac failed to converge" not in str(record.msg)
