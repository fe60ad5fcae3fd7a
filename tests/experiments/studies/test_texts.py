"""Records of text runs from the files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.studies.texts import table as text_results


def leave_a_run(folder: Path, *, epsilon: float | None, bleu: float) -> Path:
    folder.mkdir(parents=True)
    config = {
        "data": {"task": "e2e", "path": "/home/someone/e2e", "cache_dir": "/home/someone/cache"},
        "model": {"path": "/home/someone/models/llama"},
        "privacy": {"epsilon": epsilon},
        "train": {"learning_rate": 4e-3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": 0, "eval/dev/loss": 4.5, "eval/dev/perplexity": 90.0},
        {"step": 1, "seconds": 3.0},
        {"step": 2, "seconds": 1.0, "eval/dev/loss": 2.25, "eval/dev/perplexity": 9.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "privacy.json").write_text(json.dumps({"epsilon": epsilon, "target_epsilon": epsilon}))
    (folder / "scores.json").write_text(json.dumps({"bleu": bleu, "rouge_l": 0.5, "nist": 2.0, "cider": 0.1}))
    texts = [{"row": row, "source": f"name : {row}", "text": f"text {row}"} for row in (2, 0, 1)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder


def test_a_record_holds_what_was_measured_and_no_folder_of_the_machine(tmp_path: Path) -> None:
    made = text_results.record(leave_a_run(tmp_path / "noisy", epsilon=8.0, bleu=0.25))
    assert made["arm"] == "noisy"
    assert made["eval/dev/loss"] == [(0, 4.5), (2, 2.25)]
    assert [text["row"] for text in made["texts"]] == [0, 1, 2]
    assert "/home/someone" not in json.dumps(made)
    assert made["config"]["model"]["path"] == "llama"


def test_a_single_arm_s_changes_are_in_its_record(tmp_path: Path) -> None:
    folder = leave_a_run(tmp_path / "noisy", epsilon=8.0, bleu=0.25)
    config = json.loads((folder / "config.json").read_text())
    config["arms"] = {"noisy": {"train": {"learning_rate": 2e-3}, "model": {"tuning": "lora"}}}
    (folder / "config.json").write_text(json.dumps(config))
    made = text_results.record(folder)["config"]
    assert made["train"]["learning_rate"] == 2e-3
    assert made["model"] == {"path": "llama", "tuning": "lora"}


def test_the_table_has_a_row_for_each_record_and_says_what_is_absent(tmp_path: Path) -> None:
    records = [
        text_results.record(leave_a_run(tmp_path / "noisy", epsilon=3.0, bleu=0.25)),
        text_results.record(leave_a_run(tmp_path / "full", epsilon=None, bleu=0.5)),
    ]
    lines = text_results.table(records).splitlines()
    assert lines[2] == "| e2e | inf | full | 0.004 | 0.5000 | 2.0000 | absent | 0.5000 | 0.1000 | 4.500 | 2.250 | 3.0 |"
    assert lines[3].startswith("| e2e | 3 | noisy | 0.004 | 0.2500 |")
    assert len(lines) == 4


def test_the_table_says_what_was_spent_not_what_was_aimed_at(tmp_path: Path) -> None:
    folder = leave_a_run(tmp_path / "noisy", epsilon=3.0, bleu=0.25)
    statement = {"epsilon": 1.23449, "target_epsilon": 3.0, "num_steps": 2}
    about = {"command": "python --workdir=/home/someone/run", "base_model": "/home/someone/llama", "task": "e2e"}
    (folder / "privacy.json").write_text(json.dumps(statement | {"about": about}))
    made = text_results.record(folder)
    assert text_results.table([made]).splitlines()[2].startswith("| e2e | 1.235 | noisy |")
    assert made["privacy"]["about"] == {"command": None, "base_model": "llama", "task": "e2e"}


def test_unfinished_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (leave_a_run(tmp_path / "run" / "noisy", epsilon=3.0, bleu=0.25) / "scores.json").unlink()
    assert list(text_results._finished(tmp_path / "run")) == []
    assert "no run in it has been scored yet" in capsys.readouterr().out
