"""A denoiser of matrices that has none to denoise says so: the arm is then one without denoising."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import logging

from dp_rmt.finetuning import arms
from dp_rmt.finetuning.settings import Settings

pytestmark = pytest.mark.thorough

DENOISED = Settings().denoise

BIASES = {"model.tuning": "bias", "model.trainable": ".*", "privacy.accountant": "rdp"}


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [
        ({**BIASES, "denoise": DENOISED}, True),
        ({**BIASES, "denoise": ("truncate_rank",)}, True),
        ({**BIASES, "denoise": ("low_pass_filter",)}, False),  # filters biases, too
        ({**BIASES}, False),
        ({"privacy.accountant": "rdp", "denoise": DENOISED}, False),
    ],
)
def test_biases_alone_are_warned_of(
    changes: dict[str, Any],
    is_warned: bool,
    make_config: Callable[..., Settings],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        arms.prepare(make_config(changes), tmp_path)
    logging.get_absl_logger().removeHandler(caplog.handler)
    found = {record.getMessage() for record in caplog.records if "this is the run without" in record.getMessage()}
    assert len(found) == is_warned
