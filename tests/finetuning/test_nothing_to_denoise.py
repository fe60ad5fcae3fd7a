"""A denoiser of matrices that has none to denoise says so: the arm is then one without denoising."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import logging
from ml_collections import ConfigDict

from dp_rmt.finetuning import arms

BIASES = {"model.tuning": "bias", "model.trainable": ".*", "privacy.accountant": "rdp"}


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [
        ({**BIASES, "denoise.enabled": True}, True),
        ({**BIASES, "denoise.enabled": True, "denoise.method": "truncate_rank"}, True),
        ({**BIASES, "denoise.enabled": True, "denoise.method": "low_pass"}, False),  # filters biases, too
        ({**BIASES}, False),
        ({"privacy.accountant": "rdp", "denoise.enabled": True}, False),
    ],
)
def test_biases_alone_are_warned_of(
    changes: dict[str, Any],
    is_warned: bool,
    make_config: Callable[..., ConfigDict],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        arms.prepare(make_config(changes), tmp_path)
    logging.get_absl_logger().removeHandler(caplog.handler)
    found = {record.getMessage() for record in caplog.records if "denoises matrices" in record.getMessage()}
    assert bool(found) == is_warned
    assert all("none is trained with config.model.tuning='bias'" in message for message in found)
