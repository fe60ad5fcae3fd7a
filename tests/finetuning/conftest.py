"""The small program that these tests run, and the tables that some run it on (`tests/fixtures`)."""

from small_program import *  # noqa: F403
from small_tables import *  # noqa: F403
