"""The tutorials run from their first cell to their last, and their figures are what their prose says."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
LIMIT_S = 180  # of processor time


def test_all_tutorials_are_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert TUTORIALS
    assert [path.stem for path in TUTORIALS if f"\ntutorials/{path.stem}\n" not in index] == []


@pytest.mark.slow  # half a minute of a core to a minute each
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_a_fresh_folder_and_process(path, tmp_path):
    if path.stem == "own_loop":
        pytest.importorskip("equinox", reason="a tutorial has a model of equinox: pip install -e '.[docs]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "MPLBACKEND": "Agg"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < LIMIT_S
    CHECKS[path.stem](ended.stdout, tmp_path)


def percentages(printed, pattern):
    return [float(share) for share in re.findall(pattern + r" *([\d.]+)%", printed)]


def own_csv(printed, folder):
    """Private training helps, within its budget, and what is released comes with its statement."""
    ((before, after),) = re.findall(r"public model: (\S+)%, after private training: (\S+)%", printed)
    assert float(after) > float(before) + 5
    assert 1.9 < float(re.search(r"^epsilon (\S+) delta", printed, re.MULTILINE)[1]) <= 2.0
    assert {"privacy.md", "privacy.json", "config.json"} <= {path.name for path in (folder / "reviews_model").iterdir()}


def private_lora(printed, folder):
    """The adapter writes in the voice of the private letters, which the public decoder does not know."""
    public = printed.partition("the public decoder writes:")[2].splitlines()[1:4]
    assert not any(text.strip().startswith("dear") and "warmly" in text for text in public)
    written = re.findall(r"^written: (.*)$", printed, re.MULTILINE)
    assert len(written) == 3
    assert all(text.startswith("dear ") and "warmly" in text for text in written)
    before, after = re.search(r"decoder (\S+), with the private adapter (\S+)$", printed, re.MULTILINE).groups()
    assert float(after) < 0.5 * float(before)
    assert 1.9 < float(re.search(r"^epsilon (\S+) delta", printed, re.MULTILINE)[1]) <= 2.0


def own_loop(printed, folder):
    """Four classes, of which chance finds a quarter; four runs cost more than one, and less than four times as much."""
    found = percentages(printed, "accuracy")
    assert len(found) == 4
    assert min(found) > 60
    one, four = (float(value) for value in re.findall(r"epsilon (\d\S+)$", printed, re.MULTILINE))
    assert one <= 3.0 < 1.2 * 3.0 < four < 4 * 3.0


def choosing(printed, folder):
    """The noise falls with the batch, and a smaller epsilon is found less often."""
    stds = [float(std) for std in re.findall(r"\d+: (0\.\d+)", printed.splitlines()[0])]
    assert stds == sorted(stds, reverse=True)
    assert len(stds) == 4
    found = percentages(printed, "false alarms:")
    assert 1 < found[0] < found[1] < found[2] < 100


def whiten_or_denoise(printed, folder):
    """Each problem gets its own advice, and following it lowers the loss."""
    said = re.findall(r"^advice: (.*)$", printed, re.MULTILINE)
    assert [any(word in sentence for word in ("begin with whitening",)) for sentence in said] == [True, False, False]
    assert ["denoising can save steps" in sentence for sentence in said] == [False, True, False]
    assert ["more data or a larger batch" in sentence for sentence in said] == [False, False, True]
    for without, with_it in re.findall(r"loss (\S+) without and (\S+) with", printed):
        assert float(with_it) < float(without)


def auditing(printed, folder):
    """Without privacy the attacks find the members; with it no bound is above what was promised."""
    white_box = percentages(printed, "white box")
    assert white_box[0] > 95
    assert white_box[0] > white_box[1] > white_box[2]
    bounds = re.findall(r"epsilon is at least (\S+); promised (\S+)", printed)
    assert len(bounds) == 3
    assert all(float(bound) <= float(promised) for bound, promised in bounds)
    assert float(bounds[0][0]) > 2


def many_devices(printed, folder):
    """Any number of devices gives the run of one, up to rounding, and the same guarantee."""
    assert "8 devices" in printed
    found = [float(value) for value in re.findall(r"largest difference(?: from the run on one device)? (\S+)", printed)]
    assert len(found) == 2
    assert max(found) < 1e-3
    one, eight = re.findall(r"^runs/\w+: (.*)$", printed, re.MULTILINE)
    assert one == eight
    assert "epsilon" in one


CHECKS = {
    check.__name__: check
    for check in (own_csv, private_lora, own_loop, choosing, whiten_or_denoise, auditing, many_devices)
}
