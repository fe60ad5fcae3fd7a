"""The small program that these tests run (`tests/fixtures/small_program.py`)."""

from small_program import *  # noqa: F403
