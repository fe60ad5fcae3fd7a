"""METEOR 1.5 (Denkowski & Lavie 2014), by its own Java program, because an imitation would be another score."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO

from dp_rmt.scoring.java import CaptionJars

Words = Sequence[str]


def meteor(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], jars: CaptionJars) -> float:
    """Computes METEOR of the whole set, for English, as COCO's script calls the program.

    Args:
        hypotheses: N tokenised texts.
        references: for each of them at least one tokenised text.
        jars: where Java's archives are.

    Returns:
        The score in [0, 1].

    Raises:
        RuntimeError: Java failed.
    """
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-jar", str(jars.meteor)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:  # a pipe would not do: nobody reads it while the program runs
        try:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            ) as process:
                try:
                    return _converse(process, hypotheses, references)
                finally:
                    process.kill()
        except (OSError, ValueError) as error:
            errors.seek(0)
            message = errors.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"METEOR failed: {error}. {message}") from error


def _converse(
    process: subprocess.Popen[str], hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    statistics = [
        _ask(process.stdin, process.stdout, "SCORE", *map(_line, texts), _line(hypothesis))
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    _ask(process.stdin, process.stdout, "EVAL", *statistics)  # the first hypothesis's own score
    for _ in hypotheses[1:]:
        process.stdout.readline()
    return float(process.stdout.readline())


def _ask(stdin: IO[str], stdout: IO[str], *parts: str) -> str:
    stdin.write(" ||| ".join(parts) + "\n")
    stdin.flush()
    answer = stdout.readline().strip()
    if not answer:
        raise ValueError("the program ended")
    return answer


def _line(words: Words) -> str:
    return " ".join(words).replace("|||", "")
