"""The table of what a test of membership can find is what the mechanism's own trade-off curve gives, rounded up."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import dp_rmt

PAGE = (Path(__file__).parents[2] / "docs" / "start" / "privacy_in_figures.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def rounded_up(value: float, like: str) -> str:
    """With as many digits behind the point as the text has: at most so many are found."""
    digits = len(like.partition(".")[2])
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


@pytest.mark.slow  # 50 s of a core
@pytest.mark.parametrize(("target", "noise", "rare", "one_percent", "ten_percent"), ROW.findall(PAGE))
def test_a_row_is_what_the_mechanism_gives(
    target: str, noise: str, rare: str, one_percent: str, ten_percent: str
) -> None:
    run = dp_rmt.DPSGD.calibrated(
        epsilon=float(target),
        delta=1e-5,
        num_examples=67_349,
        expected_batch_size=1000,
        num_steps=202,
        l2_clip_norm=1.0,
    )
    assert f"{run.noise_multiplier:.3f}" == noise
    for false_alarms, said in ((0.001, rare), (0.01, one_percent), (0.1, ten_percent)):
        assert rounded_up(100 * run.largest_true_positive_rate(202, false_alarms), said) == said


def test_the_table_has_four_rows() -> None:
    assert [target for target, *_ in ROW.findall(PAGE)] == ["8", "3", "1", "0.5"]
