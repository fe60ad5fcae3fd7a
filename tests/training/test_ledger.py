"""The ledger keeps what was announced, whole or not at all, and refuses another run."""

from __future__ import annotations

import dataclasses
import json
import os
import stat

import pytest
from ledger_entry import ENTRY

from dp_rmt.accounting import Truncation, epsilon
from dp_rmt.noise_addition import NOISE_SUPPORT
from dp_rmt.reporting.numbers import number
from dp_rmt.training.ledger import Ledger, read_ledger

NEXT = dataclasses.replace(ENTRY, updates=40)


def test_entries_are_read_as_they_were_written(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.last is None
    ledger.append(ENTRY)
    ledger.append(NEXT)
    assert read_ledger(tmp_path) == Ledger(tmp_path).entries == [ENTRY, NEXT]
    assert stat.S_IMODE((tmp_path / "ledger.jsonl").stat().st_mode) == 0o600


def test_append_returns_when_the_line_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    Ledger(tmp_path).append(ENTRY)
    assert synced[0] == (tmp_path / "ledger.jsonl").stat().st_size


@pytest.mark.parametrize("cut", [1, 17, 300])
def test_a_last_line_that_a_crash_cut_is_left_out_and_written_anew(tmp_path, cut):
    """A crash while it was written came before anything was released under it."""
    ledger = Ledger(tmp_path)
    ledger.append(ENTRY)
    whole = ledger.path.read_bytes()
    ledger.append(NEXT)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    again = Ledger(tmp_path)
    assert again.entries == [ENTRY]
    again.append(NEXT)
    assert read_ledger(tmp_path) == [ENTRY, NEXT]
    assert ledger.path.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"run": "a"}), ""])
def test_another_broken_line_is_named(tmp_path, line):
    ledger = Ledger(tmp_path)
    ledger.append(ENTRY)
    ledger.path.write_text(line + "\n" + ledger.path.read_text())
    with pytest.raises(ValueError, match=r"ledger.jsonl, line 1 is no entry of a ledger: .*put the file back"):
        Ledger(tmp_path)


def test_an_entry_of_a_later_version_is_read(tmp_path):
    record = dataclasses.asdict(ENTRY) | {"new": 1}
    record["about"] |= {"new": 1}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(record) + "\n")
    assert read_ledger(tmp_path) == [ENTRY]


def test_another_run_is_refused_with_what_was_spent_and_the_ways_on(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.check_run(None)
    ledger.append(dataclasses.replace(ENTRY, updates=0, is_exact=True))
    ledger.check_run(None)  # nothing has been released
    ledger.append(ENTRY)
    ledger.check_run(ENTRY.run)
    truth = epsilon(
        noise_multiplier=1.0,
        delta=1e-5,
        sampling_probability=0.01,
        num_steps=20,
        truncation=Truncation(num_examples=10_000, max_batch_size=160),
        noise_support=NOISE_SUPPORT,
    )
    assert ENTRY.epsilon() == truth
    printed = number(truth, "up")
    assert float(printed) >= truth
    spent = f"up to 20 updates on 10,000 training examples were released, for epsilon = {printed} at delta = 1e-5"
    ways = r"put .*checkpoints back as they were.*or give a new --workdir.*`dp-rmt spent --workdirs="
    with pytest.raises(FileExistsError, match=rf"{spent}, but its checkpoints are gone. .*{ways}") as caught:
        ledger.check_run(None)
    assert "seeds were given" not in str(caught.value)
    with pytest.raises(FileExistsError, match="the checkpoints there are those of another run"):
        ledger.check_run("b" * 32)
    ledger.append(dataclasses.replace(ENTRY, seeds_from="given in the config", noise_multiplier=0.0, is_exact=True))
    with pytest.raises(FileExistsError, match=r"without any privacy, .*The seeds were given.*the whole folder"):
        ledger.check_run(None)
