"""What the tests of processes share: the program compiled once, and a run that nothing interrupts."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

RUN = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "run_program.py")))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def alone(cache, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((status, output),) = RUN.finish([RUN.start(cache, folder)])
    assert status == 0, output
    return folder
