"""A program whose reader leaves, as `head` does after ten lines, ends without a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dp_rmt
from dp_rmt.finetuning import broken_pipe

ROOT = Path(dp_rmt.__file__).parents[1]
ENDS_AS_BY_SIGPIPE = 141
CONSOLE = ["-c", "from dp_rmt.finetuning import console; console.main()"]
RUN = "from dp_rmt.finetuning import console; console._run(lambda: {}, ['program'])"
# More than the buffers of Python and of the pipe hold: what a command gives, and what it prints while it runs, as a
# sweep does, whose other errors of the operating system end in one line.
PRINTING = ["-c", RUN.format("'a line\\n' * 50_000")]
PRINTING_AT_WORK = ["-c", RUN.format("print('a' * 400_000)")]


@pytest.fixture
def unread() -> Iterator[int]:
    """The end of a pipe, for writing, whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def run(arguments: list[str], **outputs: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, text=True, check=False, timeout=300, cwd=ROOT, **outputs)


@pytest.mark.parametrize(
    "arguments",
    [
        [*CONSOLE, "--help"],
        [*CONSOLE, "finetune", "--help"],
        [*CONSOLE, "report", "--help"],
        ["-m", "experiments.sweep", "--help"],
        ["-m", "experiments.studies.methods.table"],
        PRINTING,
        PRINTING_AT_WORK,
    ],
    ids=["help", "finetune help", "report help", "sweep help", "a study's table", "what a command gives", "at work"],
)
def test_nobody_reads_and_nothing_is_said(arguments: list[str], unread: int) -> None:
    ended = run(arguments, stdout=unread, stderr=subprocess.PIPE)
    assert ended.stderr == ""
    assert ended.returncode == ENDS_AS_BY_SIGPIPE


def test_the_reader_of_both_outputs_has_left(unread: int) -> None:
    ended = run([*CONSOLE, "finetune", "--help"], stdout=unread, stderr=unread)
    assert ended.returncode == ENDS_AS_BY_SIGPIPE


def test_a_closed_output_is_no_error() -> None:
    """As in ``dp-rmt --help >&-``."""
    closing = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    ended = run(["-c", closing, *CONSOLE, "--help"], stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_connection_that_breaks_is_an_error_as_before() -> None:
    """With outputs that are read, a BrokenPipeError is somebody else's: it must be seen."""
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(BrokenPipeError), broken_pipe.ending_quietly():
        here.sendall(b"metrics")
