"""The figures of docs/comparison.md, and of the benchmarks' README, are those of the committed records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "experiments" / "benchmarks" / "README.md").read_text(encoding="utf-8")
RECORDS = ROOT / "experiments" / "benchmarks" / "results"
PEERS = {"jax_privacy", "optax"}

Row = tuple[str, ...]


def sections(page: str) -> Iterator[tuple[dict[str, Any], str]]:
    """A record that a heading's text links, and that text, with its command and its table."""
    for text in re.split(r"^###? ", page, flags=re.MULTILINE):
        for path in re.findall(r"\(\.\./experiments/benchmarks/results/([\w./-]+\.json)\)", text):
            yield json.loads((RECORDS / path).read_text(encoding="utf-8")) | {"path": path}, text


def table(text: str) -> list[Row]:
    """The cells of a table, without its head."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def rows_of_step(record: Mapping[str, Any]) -> list[Row]:
    """What the page says of a record of `experiments.benchmarks.step.main`, slowest last."""
    arms = [
        (
            arm["time_ratio"],
            name,
            f"{arm['time_ratio']:.2f}",
            f"{arm['seconds']:.2f}",
            f"{arm['temp_bytes_ratio']:.2f}",
            str(arm["microbatch_size"] or "all"),
        )
        for name, arm in record["arms"].items()
    ]
    if record["torch"]:
        of_torch = record["torch"]["arms"]
        names = {"plain": "plain torch", "opacus_ghost": "Opacus, ghost"}
        arms += [
            (ratio + 1e-9, names[name], f"{ratio:.2f}", f"{arm['seconds']:.2f}", "not measured", "all")
            for name, arm in of_torch.items()
            for ratio in [arm["time_ratio"]]
        ]
    return [tuple(cells) for _, *cells in sorted(arms)]


def rows_of_calibration(record: Mapping[str, Any]) -> list[Row]:
    return [
        (name, f"{arm['noise_multiplier']:.4f}", f"{arm['epsilon_by_pld']:.3f}") for name, arm in record["arms"].items()
    ]


def problems(page: str) -> list[str]:
    """What a page says that its records do not."""
    found = []
    for record, text in sections(page):
        rows = rows_of_step(record) if record["path"].startswith("step/") else rows_of_calibration(record)
        found += [f"{record['path']}: {row}" for row in sorted({*table(text)} ^ {*rows})]
        command = record["command"].replace("experiments.profile_step", "experiments.benchmarks.step.main")
        if command not in " ".join(text.replace("\\\n", " ").split()):
            found.append(f"{record['path']}: {command}")
    return found


def test_every_figure_is_that_of_its_record() -> None:
    assert problems(PAGE) == []


def test_every_record_with_a_peer_is_on_the_page() -> None:
    shown = {record["path"] for record, _ in sections(PAGE)}
    for path in RECORDS.glob("step/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if PEERS & record.get("arms", {}).keys() or record.get("torch"):
            assert f"step/{path.name}" in shown


@pytest.mark.parametrize(
    ("before", "after"),
    [("| 4.16 |", "| 4.61 |"), ("| 0.7556 |", "| 0.7565 |"), ("--sequence_length=32", "--sequence_length=64")],
)
def test_a_figure_that_drifts_is_found(before: str, after: str) -> None:
    assert before in PAGE
    assert problems(PAGE.replace(before, after)) != []


def times_faster(page: str) -> list[tuple[float, str, str]]:
    """Sentences such as "3.9 times as fast as jax_privacy with 128 tokens"."""
    found = re.findall(r"([\d.]+)\s+times\s+as\s+fast\s+as\s+(\w+)\s+with\s+(\d+)\s+tokens", page)
    return [(float(times), peer, tokens) for times, peer, tokens in found]


def test_what_the_prose_says_of_speed_is_in_the_records() -> None:
    assert len(times_faster(PAGE)) == 4
    for times, peer, tokens in times_faster(PAGE):
        (path,) = RECORDS.glob(f"step/roberta_base-*-s{tokens}-l4.json")
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        assert times == pytest.approx(arms[peer]["seconds"] / arms["bookkeeping"]["seconds"], abs=0.05)


RECORD_OF_LABEL = {
    "RoBERTa-base, batch 32 x 128": "roberta_base-cpu-float32-b32-s128-l12",
    "RoBERTa-base, 4 of 12 layers, batch 32 x 128": "roberta_base-cpu-float32-b32-s128-l4",
    "the same 4 layers, batch 32 x 32 (Intel Xeon, 2 cores, beside other jobs)": "roberta_base-cpu-float32-b32-s32-l4",
    "Llama-shaped, hidden 1024, LoRA 16, batch 4 x 512": "llama_1024_lora-cpu-float32-b4-s512-l8",
    "the same, all parameters": "llama_1024-cpu-float32-b4-s512-l8",
    "Llama-shaped, 4 layers (114M parameters), LoRA 16, batch 2 x 256": "llama_1024_lora-cpu-float32-b2-s256-l4",
    "the same, all parameters (113M)": "llama_1024-cpu-float32-b2-s256-l4",
}


def as_written(value: float, text: str) -> str:
    """The value with as many digits behind the point as the text has."""
    return f"{value:.{len(text.partition('.')[2])}f}"


def test_the_benchmarks_readme_says_the_same() -> None:
    (text,) = (part for part in re.split(r"^## ", BENCHMARKS, flags=re.MULTILINE) if "(`step`)" in part)
    record: dict[str, Any] = {}
    for label, arm, *figures in table(text):
        if label:
            record = json.loads((RECORDS / "step" / f"{RECORD_OF_LABEL[label]}.json").read_text(encoding="utf-8"))
        if arm == "Opacus, ghost (to plain torch)":
            found = record["torch"]["arms"]["opacus_ghost"]
        else:
            found = record["arms"][arm]
        values = (found.get(key) for key in ("time_ratio", "seconds", "temp_bytes_ratio"))
        assert figures == ["" if value is None else as_written(value, text) for value, text in zip(values, figures)]
