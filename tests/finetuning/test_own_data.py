"""One's own data, every task in every format: the same tokens, and a model that is trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_data import CELLS, FORMATS, MATRIX, OF_FILES, TEXTS
from small_program import Ended

import dp_rmt
from dp_rmt.data import fingerprint
from dp_rmt.finetuning import arms
from dp_rmt.finetuning.assemble import load_task
from dp_rmt.finetuning.options import walk
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.shorthand import is_in_memory, settings_from

SMALL: dict[str, Any] = {
    "num_steps": 2,
    "max_length": 24,
    "length_groups": (),
    "expected_batch_size": 8,
    "max_batch_size": 16,
    "microbatch_size": 8,
    "accountant": "rdp",
    "delta": 1e-2,
    "denoise": (),
    "advice": False,
    "generation": {"method": "greedy", "max_new_tokens": 4, "batch_size": 4, "max_prompts": 2, "prompt_lengths": (20,)},
}


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("own_llama"), " ".join(TEXTS).lower() + " what of", max_length=64)


@pytest.fixture
def call(model: Path, llama: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``(task, format) -> arguments of dp_rmt.finetune``."""

    def arguments(task: str, kind: str) -> dict[str, Any]:
        folder = tmp_path / "data"
        folder.mkdir()
        return {
            "model": str(model if CELLS[task].task == "labelled_table" else llama),
            "train": FORMATS[kind](CELLS[task].rows, folder),
            "epsilon": 4.0,
            "cache_dir": str(tmp_path / "cache"),
            **SMALL,
            **CELLS[task].settings,
        }

    return arguments


def read(arguments: dict[str, Any]) -> Any:
    given = dict(arguments)
    model, train, epsilon = (given.pop(name) for name in ("model", "train", "epsilon"))
    train = train if is_in_memory(train) else str(train)
    return load_task(settings_from(model, train, epsilon, given), train if is_in_memory(train) else None)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plots of the report, which take half of the time of two steps."""
    monkeypatch.setattr(arms, "report", lambda workdir: "")


@pytest.mark.usefixtures("quickly")
@pytest.mark.slow  # tests/data/readers/test_rows.py compares what every cell gives; the kinds of task are trained below
@pytest.mark.parametrize(("task", "kind"), MATRIX)
def test_every_task_in_every_format_is_trained_on_the_same_tokens(
    task: str, kind: str, call: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = call(task, kind)
    run = dp_rmt.finetune(**given, workdir=tmp_path / "run")
    assert run.settings.data.task == CELLS[task].task
    assert run.privacy["num_steps"] == 2
    assert run.privacy["num_examples"] == len(CELLS[task].rows)
    has_dev = "split" in kind
    assert {name.split("/")[0] for name in run.scores} == ({"dev"} if has_dev else set())
    assert (tmp_path / "run" / "texts.jsonl").exists() == (has_dev and CELLS[task].task == "text_pairs")
    expected = read({**given, "train": list(CELLS[task].rows)})
    assert fingerprint(run.task.train) == fingerprint(expected.train)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("three classes", "csv"),
        pytest.param("conversations", "a Dataset", marks=pytest.mark.slow),
        pytest.param("documents", "json", marks=pytest.mark.slow),
    ],
)
def test_the_three_kinds_of_task_are_trained(
    task: str, kind: str, call: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = call(task, kind)
    run = dp_rmt.finetune(**given, workdir=tmp_path / "run")
    assert (run.settings.data.task, run.privacy["num_steps"], run.scores) == (CELLS[task].task, 2, {})
    said = capsys.readouterr().err
    assert "plan: 24 rows, batch 8, 2 steps, noise " in said
    assert "epsilon 4, delta 0.01\n" in said
    assert "nothing is evaluated" in said


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings of a call as `dp-rmt finetune` takes them."""
    names = {
        key.rpartition(".")[2]: key for key, *_ in walk(Settings) if not key.startswith(("synthetic.", "generation."))
    }
    flat = {**settings, **{f"generation.{name}": value for name, value in settings.get("generation", {}).items()}}
    flat.pop("generation", None)
    return [f"--config.{names.get(name, name)}={value}" for name, value in flat.items()]


@pytest.fixture
def command(
    model: Path, llama: Path, run_side_by_side: Callable[..., dict[str, Ended]], tmp_path: Path
) -> Callable[..., dict[str, Ended]]:
    """``({task: file}, **settings) -> {task: Ended}``: what `dp-rmt finetune` made of them, side by side."""

    def run(files: dict[str, Path], **settings: Any) -> dict[str, Ended]:
        given = {}
        for task, file in files.items():
            base = model if CELLS[task].task == "labelled_table" else llama
            flags = as_flags({**SMALL, **CELLS[task].settings, **settings, "cache_dir": tmp_path / "cache"})
            given[task] = [f"--train={file}", f"--model={base}", "--epsilon=4", *flags]
        return run_side_by_side(["-m", "dp_rmt.finetuning.console", "finetune"], "--workdir", given)

    return run


@pytest.mark.slow  # all tasks as processes of their own, for each format
@pytest.mark.parametrize("kind", OF_FILES)
def test_the_command_trains_every_task_in_every_format(
    kind: str, command: Callable[..., dict[str, Ended]], tmp_path: Path
) -> None:
    files = {}
    for task in [task for task, of in MATRIX if of == kind]:
        (tmp_path / task).mkdir()
        files[task] = FORMATS[kind](CELLS[task].rows, tmp_path / task)
    for task, run in command(files).items():
        assert run.code == 0, run.stderr
        assert "plan: 24 rows, batch 8, 2 steps, noise " in run.stderr
        assert json.loads((run.folder / "config.json").read_text())["data"]["task"] == CELLS[task].task
        assert json.loads((run.folder / "privacy.json").read_text())["num_examples"] == len(CELLS[task].rows)
        assert (run.folder / "texts.jsonl").exists() == ("split" in kind and CELLS[task].task == "text_pairs")


@pytest.mark.slow  # a process of its own
def test_the_command_holds_a_share_of_the_rows_out(command: Callable[..., dict[str, Ended]], tmp_path: Path) -> None:
    file = FORMATS["jsonl"](CELLS["conversations"].rows, tmp_path)
    run = command({"conversations": file}, dev_share=0.3)["conversations"]
    assert run.code == 0, run.stderr
    assert json.loads((run.folder / "privacy.json").read_text())["num_examples"] < len(CELLS["conversations"].rows)
    assert (run.folder / "texts.jsonl").exists()


@pytest.mark.slow  # a process of its own
def test_the_command_names_a_row_with_a_fault(command: Callable[..., dict[str, Ended]], tmp_path: Path) -> None:
    file = FORMATS["tsv"](CELLS["scores"].rows, tmp_path)
    file.write_text(file.read_text().replace("\t1.25\n", "\tmuch\n"))
    refused = command({"scores": file})["scores"]
    assert refused.code == 1
    assert "rows.tsv, line 7: the score 'much' in column 'label' is not a finite number" in refused.stderr
    assert "Traceback" not in refused.stderr
