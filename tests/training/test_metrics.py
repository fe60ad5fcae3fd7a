"""metrics.jsonl: what is written is read again, and a killed run loses at most the line in flight."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dp_rmt.files import write_atomically
from dp_rmt.training.metrics import MetricsWriter, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def written(path, value):
    MetricsWriter(path).append(1, {"x": value})
    return read_metrics(path)[-1]["x"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (True, True),
        (None, None),
        ("dev", "dev"),
        (0.1, 0.1),
        (math.nan, None),
        (-math.inf, None),
        (np.int64(7), 7),
        (np.bool_(False), False),
        (np.float64(1 / 3), 1 / 3),
        (np.float32(0.1), 0.1),  # the fewest digits that name this float32
        (jnp.float32(0.1), 0.1),
        (jnp.bfloat16(0.5), 0.5),
        (jnp.arange(3), [0, 1, 2]),
        (np.array([[1.5, np.nan]]), [[1.5, None]]),
        ((1, jnp.float32(2.5)), [1, 2.5]),
        ({"encoder/query/kernel": jnp.array([3, 2])}, {"encoder/query/kernel": [3, 2]}),
    ],
)
def test_values_become_json(path, value, expected):
    result = written(path, value)
    assert result == expected
    assert type(result) is type(expected)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=5), elements=st.floats(width=32)))
def test_float32_survives_bit_for_bit(tmp_path_factory, array):
    read = np.array(written(tmp_path_factory.mktemp("run") / "metrics.jsonl", array), dtype=np.float32)
    np.testing.assert_array_equal(read, np.where(np.isfinite(array), array, np.float32(np.nan)))


def test_lines_are_strict_json_with_the_step_first(path):
    writer = MetricsWriter(path)
    writer.append(0, {"eval/dev/accuracy": 0.5})
    writer.append(1, {"epsilon": float("inf"), "name": "ε\n"})
    lines = path.read_text().split("\n")
    assert lines[0] == '{"step": 0, "eval/dev/accuracy": 0.5}'
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"step": 1, "epsilon": None, "name": "ε\n"}
    assert lines[2:] == [""]


def test_every_line_is_on_disk_when_append_returns(path):
    writer = MetricsWriter(path)
    for step in range(3):
        writer.append(step, {"loss": 0.5})
        assert len(read_metrics(path)) == step + 1


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (object(), TypeError, "'x' is a object"),
        (1j, TypeError, "complex"),
        (np.array(1j), TypeError, "complex128"),
        ({"a": [np.array("text")]}, TypeError, r"x\[a\]\[0\]"),
        (np.zeros((200, 100)), ValueError, r"\(200, 100\)"),
    ],
)
def test_refused_values_name_the_metric_and_leave_no_trace(path, value, error, message):
    writer = MetricsWriter(path)
    with pytest.raises(error, match=message):
        writer.append(1, {"x": value})
    assert read_metrics(path) == []


def test_step_is_reserved(path):
    with pytest.raises(ValueError, match="'step'"):
        MetricsWriter(path).append(1, {"step": 2})


def test_resuming_removes_what_came_after_the_checkpoint(path):
    writer = MetricsWriter(path)
    for step in range(6):
        writer.append(step, {"loss": step / 10})
    writer.append(2, {"eval/dev/accuracy": 0.7})
    writer.truncate_after(2)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 2]
    writer.append(3, {"loss": 0.25})
    assert read_metrics(path)[-1] == {"step": 3, "loss": 0.25}
    writer.truncate_after(-1)
    assert read_metrics(path) == []
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]  # no temporary files


@pytest.mark.parametrize("keep", range(1, 30))
def test_a_run_killed_while_writing_loses_only_that_line(path, keep):
    writer = MetricsWriter(path)
    writer.append(1, {"loss": 0.5})
    whole = path.read_bytes()
    writer.append(2, {"loss": 0.25, "x": 1})
    in_flight = path.read_bytes()[len(whole) :]
    assert keep < len(in_flight) - 1
    path.write_bytes(whole + in_flight[:keep])
    assert [line["step"] for line in read_metrics(path)] == [1]
    resumed = MetricsWriter(path)
    resumed.append(2, {"loss": 0.25})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_whole_last_line_without_its_newline_is_kept(path):
    MetricsWriter(path).append(1, {"loss": 0.5})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    MetricsWriter(path).append(2, {})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "[1]", '{"loss": 1.0}', '{"step": "2"}', "", "\x00\x00"])
def test_a_broken_line_in_the_middle_names_file_and_line(path, broken):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 "):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(path)
    assert path.read_bytes() == before


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
