"""Ledger and statement are ahead of what is computed, whatever a run goes through."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from ledger_entry import ENTRY

from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.reporting.provenance import Provenance
from dp_rmt.training.ledger import read_ledger
from dp_rmt.training.releases import Releases

FIRST = dataclasses.replace(ENTRY, updates=0, is_exact=True, num_steps=100)


def statement(updates: int) -> PrivacyStatement:
    return PrivacyStatement(
        epsilon=updates / 10,
        target_epsilon=10.0,
        delta=1e-5,
        epsilon_pld=None,
        epsilon_rdp=None,
        noise_multiplier=1.0,
        l2_clip_norm=0.1,
        clip="flat",
        sampling_probability=0.01,
        expected_batch_size=100.0,
        max_batch_size=160,
        num_steps=updates,
        num_examples=10_000,
        noise_std=1e-3,
        seeds_from="os entropy",
        nonprivate_metrics=False,
    )


def opened(folder, steps_done=0, **changes) -> Releases:
    return Releases(folder, dataclasses.replace(FIRST, updates=steps_done, **changes), statement)


def stated(folder):
    record = read_privacy(folder)
    last = read_ledger(folder)[-1]
    assert (record["num_steps"], record["is_upper_bound"]) == (last.updates, not last.is_exact)
    assert record["epsilon"] == last.updates / 10
    return last.updates, last.is_exact


def test_before_the_first_update_the_statement_is_of_none_and_the_ledger_is_empty(tmp_path):
    opened(tmp_path)
    record = read_privacy(tmp_path)
    assert (record["num_steps"], record["epsilon"], record["is_upper_bound"]) == (0, 0.0, False)
    assert record["about"]["task"] == "sst2"
    assert read_ledger(tmp_path) == []


def test_a_stretch_is_announced_once_and_the_next_is_prepared(tmp_path):
    computed: list[tuple[int, str]] = []

    def counted(updates: int) -> PrivacyStatement:
        computed.append((updates, threading.current_thread().name))
        return statement(updates)

    releases = Releases(tmp_path, FIRST, counted)
    releases.announce(20, then=40)
    assert stated(tmp_path) == (20, False)
    releases.announce(20, then=40)
    releases.announce(40)
    assert stated(tmp_path) == (40, False)
    releases.stopped(31)
    assert stated(tmp_path) == (31, True)
    assert [entry.updates for entry in read_ledger(tmp_path)] == [20, 40, 31]
    assert {updates for updates, name in computed if name.startswith("statement")} == {40}


def test_the_ledger_is_written_before_the_statement_and_both_before_announce_returns(tmp_path, monkeypatch):
    releases = opened(tmp_path)
    monkeypatch.setattr("dp_rmt.training.releases.write_privacy", lambda *args: pytest.fail(str(stated_only(tmp_path))))
    with pytest.raises(pytest.fail.Exception, match="20"):
        releases.announce(20)


def stated_only(folder):
    return read_ledger(folder)[-1].updates


def test_a_full_disk_stops_the_run_before_the_updates(tmp_path, monkeypatch):
    releases = opened(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space left"):
        releases.announce(20)
    monkeypatch.undo()
    assert read_ledger(tmp_path) == []
    opened(tmp_path).announce(20)
    assert stated(tmp_path) == (20, False)


@pytest.mark.parametrize(
    ("stops_at", "expected"), [(30, (40, False)), (40, (40, True)), (55, (55, True)), (100, (100, True))]
)
def test_what_a_killed_process_announced_stays_until_the_run_is_beyond_it(tmp_path, stops_at, expected):
    opened(tmp_path).announce(40)  # and is killed; the checkpoint is of step 20
    releases = opened(tmp_path, 20)
    assert stated(tmp_path) == (40, False)
    for bound in range(25, stops_at + 5, 5):
        releases.announce(bound)
    releases.stopped(stops_at)
    assert stated(tmp_path) == expected


def test_a_run_that_goes_back_to_an_older_checkpoint_spends_nothing_more(tmp_path):
    releases = opened(tmp_path)
    releases.announce(40)
    releases.stopped(40)
    releases = opened(tmp_path, 20)  # the checkpoint of step 40 is damaged
    releases.announce(30)
    assert stated(tmp_path) == (40, True)
    releases.stopped(30)
    assert stated(tmp_path) == (40, True)
    assert len(read_ledger(tmp_path)) == 2


@pytest.mark.parametrize(("steps_done", "is_exact"), [(20, False), (100, True)])
def test_a_run_from_before_there_were_ledgers_begins_one(tmp_path, steps_done, is_exact):
    """Unless it is at its end, it may have been killed beyond its checkpoint."""
    opened(tmp_path, steps_done)
    assert stated(tmp_path) == (steps_done, is_exact)


def test_another_run_is_refused(tmp_path):
    opened(tmp_path).announce(20)
    with pytest.raises(FileExistsError, match="those of another run"):
        opened(tmp_path, run="b" * 32)


def test_a_finished_run_that_is_looked_at_again_keeps_its_date_and_command(tmp_path):
    releases = opened(tmp_path, about=Provenance(command="first"))
    releases.announce(100)
    releases.stopped(100)
    before = read_privacy(tmp_path)
    releases = opened(tmp_path, 100, about=Provenance(command="second"))
    releases.stopped(100)
    assert read_privacy(tmp_path) == before
    assert before["about"]["command"] == "first"
