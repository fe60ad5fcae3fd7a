"""The small program that these tests run (`tests/program.py`)."""

from tests.program import *  # noqa: F403
