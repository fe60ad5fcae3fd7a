"""A program whose output nobody reads any more, as that of ``dp-rmt finetune --help | head`` after ten lines."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Ends the program without a message if a pipe that it prints to has no reader any more.

    The exit status is 141, as if the signal SIGPIPE had ended it. The signal itself stays ignored, as Python has it: it
    would also end a training whose connection to another process, or to a server of metrics, breaks. An error of such a
    connection is raised on.
    """
    try:
        try:
            yield
        finally:
            for stream in _outputs():
                stream.flush()  # here, because at the interpreter's end the error could no longer be caught
    except BrokenPipeError:
        if not (unread := without_reader()):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in unread:
            os.dup2(nowhere, descriptor)
        sys.exit(128 + signal.SIGPIPE)


def without_reader() -> list[int]:
    """The file descriptors of standard output and standard error that are pipes whose reader has left."""
    poll = select.poll()
    for stream in _outputs():
        with contextlib.suppress(OSError, ValueError):  # a notebook's, say, is no file of the operating system
            poll.register(stream.fileno(), 0)
    return [descriptor for descriptor, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]


def _outputs() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # one that is closed is None
