"""The packages that only a part of dp_rmt needs: without them that part says which command installs them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports of third parties that an extra of dp_rmt installs; where one is missing, the error names the command.

        with extra("report"):
            import matplotlib

    Args:
        name: of the extra in setup.py.

    Raises:
        ModuleNotFoundError: a package is not installed; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "dp_rmt":
            raise
        raise _not_installed([error.name.partition(".")[0]], name) from error


def check_installed(name: str, modules: Sequence[str]) -> None:
    """Raises ModuleNotFoundError, with the command that installs them, unless all modules can be found.

    Args:
        name: of the extra in setup.py.
        modules: top-level names, which are looked for and not imported.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise _not_installed(missing, name)


def _not_installed(modules: list[str], extra_name: str) -> ModuleNotFoundError:
    names = ", ".join(modules)
    are = "is" if len(modules) == 1 else "are"
    message = f"This part of dp_rmt needs {names}, which {are} not installed: pip install 'dp_rmt[{extra_name}]'"
    return ModuleNotFoundError(message, name=modules[0])
