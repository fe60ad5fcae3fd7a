"""Other writers of metrics: they get public numbers, each step once, also when a run is resumed."""

from __future__ import annotations

import csv
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dp_rmt.training.metrics import MetricsWriter
from dp_rmt.training.writers import Writers, check_writers, open_writers

LINES = [
    (0, {"eval/dev/accuracy": 0.5, "name": "text", "denoise/kept_rank": {"a": [1, 2]}}),
    (1, {"learning_rate": 0.1, "nonprivate/loss": 0.7, "epsilon": None}),
    (2, {"learning_rate": 0.2, "nonprivate/loss": np.float32(0.6)}),
    (2, {"eval/dev/accuracy": 0.75}),
]


def write(workdir, kinds, lines=LINES, **options):
    """What a run writes that ends in good order."""
    metrics = MetricsWriter(workdir / "metrics.jsonl", open_writers(kinds, workdir, name="run", config={}, **options))
    for step, values in lines:
        metrics.append(step, values)
    return metrics


def table(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("nonprivate", [False, True])
def test_csv_has_a_row_for_each_step(tmp_path, nonprivate):
    write(tmp_path, ["csv"], nonprivate=nonprivate).close()
    raw = [{"nonprivate/loss": value} if nonprivate else {} for value in ("", "0.7", "0.6")]
    assert table(tmp_path) == [
        {"step": "0", "eval/dev/accuracy": "0.5", "learning_rate": "", **raw[0]},
        {"step": "1", "eval/dev/accuracy": "", "learning_rate": "0.1", **raw[1]},
        {"step": "2", "eval/dev/accuracy": "0.75", "learning_rate": "0.2", **raw[2]},
    ]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    """It goes on from step 1: what was written of step 2 is done again."""
    write(tmp_path, ["csv"]).flush()
    metrics = MetricsWriter(tmp_path / "metrics.jsonl", open_writers(["csv"], tmp_path, name="run", config={}))
    metrics.truncate_after(1)
    metrics.append(2, {"learning_rate": 0.3})
    metrics.close()
    assert [(row["step"], row["learning_rate"]) for row in table(tmp_path)] == [("0", ""), ("1", "0.1"), ("2", "0.3")]


class Recorded:
    """Keeps what it is given."""

    def __init__(self):
        self.calls = []

    def begin(self, lines):
        self.calls.append(("begin", list(lines)))

    def append(self, step, values):
        self.calls.append((step, values))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_writers_get_public_numbers_alone(tmp_path):
    one = Recorded()
    metrics = MetricsWriter(tmp_path / "metrics.jsonl", Writers([one]))
    for step, values in LINES:
        metrics.append(step, values)
    metrics.flush()
    metrics.close()
    assert one.calls == [
        ("begin", []),
        (0, {"eval/dev/accuracy": 0.5}),
        (1, {"learning_rate": 0.1}),
        (2, {"learning_rate": 0.2}),
        (2, {"eval/dev/accuracy": 0.75}),
        "flush",
        "close",
    ]
    again = Recorded()
    MetricsWriter(tmp_path / "metrics.jsonl", Writers([again], nonprivate=True))
    assert again.calls[0][1][1] == (1, {"learning_rate": 0.1, "nonprivate/loss": 0.7})


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_writers(["csv"])
    with pytest.raises(
        ModuleNotFoundError, match=r"needs wandb, which is not installed: pip install 'dp_rmt\[wandb\]'"
    ):
        check_writers(["csv", "wandb"])


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, ["tensorboard"]).flush()
    metrics = write(tmp_path, ["tensorboard"], lines=[])  # a second process
    metrics.truncate_after(1)
    metrics.append(2, {"learning_rate": 0.3})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["tensors"]) == {"eval/dev/accuracy", "learning_rate"}
    assert [event.step for event in events.Tensors("learning_rate")] == [1, 2]


class FakeWandb(SimpleNamespace):
    """Takes what the real one is called with."""

    def __init__(self):
        super().__init__(calls=[], Settings=lambda **settings: settings)
        self.run = SimpleNamespace(
            step=0,
            log=lambda values, step: self.calls.append((step, values)),
            finish=lambda: self.calls.append("finish"),
        )

    def init(self, **arguments):
        self.calls.append(arguments)
        return self.run


def test_wandb_gets_no_command_no_console_and_no_raw_values(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, ["wandb"], online=False).close()
    begun, *logged = fake.calls
    assert begun["mode"] == "offline"
    assert Path(begun["dir"]) == tmp_path
    assert begun["settings"] == {
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "host": "",
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
    }
    assert logged == [
        (0, {"eval/dev/accuracy": 0.5}),
        (1, {"learning_rate": 0.1}),
        (2, {"learning_rate": 0.2}),
        (2, {"eval/dev/accuracy": 0.75}),
        "finish",
    ]
    again = FakeWandb()
    again.run.step = 2
    monkeypatch.setitem(sys.modules, "wandb", again)
    write(tmp_path, ["wandb"], lines=[]).close()
    assert again.calls[0]["id"] == begun["id"]  # it goes on with the same run,
    assert [call[0] for call in again.calls[1:-1]] == [2, 2]  # which has the steps before


RECORDED = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from test_writers import LINES, write
kept = LINES if sys.argv[3] == "begins" else []
write(Path(sys.argv[2]), ["wandb"], lines=kept, online=False).close()
"""


def payloads(path):
    """The records of a file in the format of LevelDB's log: blocks of 32 kB, and parts with 7 bytes before each."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no part begins at a block's end
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last
            yield record
            record = b""


def history(folder):
    """The lines that a run of Weights & Biases has written down offline, as ``{step: names}``."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for payload in payloads(next(folder.glob("run-*.wandb"))):
        record = wandb_internal_pb2.Record.FromString(payload)
        if record.WhichOneof("record_type") == "run":
            assert record.run.host == ""
        if record.WhichOneof("record_type") == "history":
            names = {item.key or item.nested_key[0] for item in record.history.item}
            step = record.history.step.num
            assert step not in found
            found[step] = {name for name in names if not name.startswith("_")}
    return found


@pytest.mark.thorough
def test_the_real_wandb_has_the_numbers_and_nothing_of_this_machine(tmp_path):
    """Two processes, as a run that was stopped and goes on: what the second has written holds the whole run."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for when in ("begins", "goes on"):
        arguments = [sys.executable, "-c", RECORDED, str(Path(__file__).parent), str(tmp_path), when]
        environment = {**os.environ, "WANDB_DIR": "", "SECRET_OF_THE_SHELL": "unmistakable"}
        subprocess.run(arguments, check=True, env=environment, cwd=tmp_path, timeout=120)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    steps = {0: {"eval/dev/accuracy"}, 1: {"learning_rate"}, 2: {"learning_rate", "eval/dev/accuracy"}}
    assert [history(folder) for folder in folders] == [steps, steps]
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and path.suffix != ".log"]
    assert {path.suffix for path in written} == {".wandb"}  # no requirements.txt, no metadata
    for trace in ("unmistakable", "test_writers", "nonprivate", "memory_percent", str(Path(__file__).parent)):
        assert [path.name for path in written if trace.encode() in path.read_bytes()] == [], trace
