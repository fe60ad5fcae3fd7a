"""The code of README and docs runs, its commands and settings exist, and errors that a page quotes are raised."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from dp_rmt.finetuning.console import COMMANDS
from dp_rmt.finetuning.options import walk
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import PerExampleDropout, example_keys

ROOT = Path(__file__).parents[2]
# Design pages sketch interfaces, in a notation of their own. The blocks of the README are run by tests/test_readme.py.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"design", "_build"} & set(path.parts))
SETTINGS = {key for key, *_ in walk(Settings)}
GROUPS = {key.rpartition(".")[0] for key in SETTINGS}


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of a page, those inside of lists included."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf"^ *(?:\d+\. )?```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


class Model(nn.Module):
    """What the page on sharp edges calls `model`."""

    @nn.compact
    def __call__(self, x, keys=None):
        return nn.Dense(2)(PerExampleDropout(0.1)(x, keys))


def names_around(page: str) -> dict:
    """What the text of a page lets its blocks take as given."""
    if page != "sharp_edges":
        return {}
    indices = np.array([2, 0, 1])
    return {
        "jax": jax,
        "example_keys": example_keys,
        "PerExampleDropout": lambda rate: lambda x, keys: x,  # it is called inside of a model, as `Model` does
        "key": jax.random.key(0),
        "step": 3,
        "indices": indices,
        "keys": None,
        "x": np.ones((4, 3), np.float32),
        "model": Model(),
        "loss_of": lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, np.zeros(3, int)),
    }


def run_block(path: Path, number: int) -> dict:
    """Runs a block, and returns its names."""
    names = names_around(path.stem)
    exec(compile(blocks(path, "python")[number], str(path), "exec"), names)
    return names


# The programs of the page of the first ten minutes are files, which tests/docs/test_ten_minutes.py runs in order.
PYTHON = [
    (path, number) for path in PAGES if path.stem != "ten_minutes" for number in range(len(blocks(path, "python")))
]


@pytest.mark.parametrize(
    ("path", "number"), PYTHON, ids=lambda part: part.stem if isinstance(part, Path) else str(part)
)
def test_a_block_of_python_runs(path, number, monkeypatch):
    monkeypatch.setattr("dp_rmt.environment.prepare", lambda: None)  # JAX is imported here already
    names = run_block(path, number)
    if "losses" in names:
        params = Model().init(jax.random.key(0), np.ones((1, 3), np.float32))
        assert names["losses"](params, names["batch"]).shape == (3,)


OTHERS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.py")),
]


@pytest.mark.parametrize("path", [*OTHERS, *PAGES], ids=lambda path: path.stem)
def test_commands_and_settings_exist(path):
    text = path.read_text(encoding="utf-8")
    assert unknown_commands(text) == []
    assert unknown_settings(text) == []


def unknown_commands(text: str) -> list[str]:
    return [name for name in re.findall(r"\bdp-rmt ([a-z]+)", text) if name not in COMMANDS]


def unknown_settings(text: str) -> list[str]:
    named = re.findall(r"(?<![\w/])config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?!\.?\w*/)", text)
    return [key for key in named if key not in SETTINGS | GROUPS and key not in ("json",)]


def test_errors_that_troubleshooting_quotes_are_raised_somewhere():
    page = (ROOT / "docs" / "start" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r'^\| "([^"]+)" ', page, re.MULTILINE)
    assert quoted
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dp_rmt").rglob("*.py"))
    assert [words for words in quoted if words not in source] == []


def test_a_broken_block_of_python_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- In a list:\n\n  ```python\n  import dp_rmt\n  dp_rmt.calibrate()\n  ```\n", encoding="utf-8")
    with pytest.raises(AttributeError, match="calibrate"):
        run_block(page, 0)


def test_a_wrong_command_and_a_wrong_setting_are_found():
    assert unknown_commands("run `dp-rmt docter`") == ["docter"]
    assert unknown_settings("give --config.train.num_step=3, or config.privacy.epsilon") == ["train.num_step"]
