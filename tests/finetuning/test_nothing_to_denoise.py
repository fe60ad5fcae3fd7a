"""A denoiser of matrices that has none to denoise says so: the arm is then one without denoising."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import logging

from dp_rmt.finetuning import arms
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import SequenceClassifier, init_params, load_pretrained, load_tokenizer, save_pretrained

pytestmark = pytest.mark.thorough

DENOISED = Settings().denoise


@pytest.fixture(scope="module")
def classifier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its pooler: one that the file lacks would train, and is a matrix."""
    encoder, _ = load_pretrained(model, head="masked_lm")
    module = SequenceClassifier(encoder.config, 2)
    folder, tokenizer = tmp_path_factory.mktemp("classifier") / "model", load_tokenizer(model)
    params = init_params(module, jax.random.key(3))
    save_pretrained(folder, module, params, tokenizer=tokenizer, label_names=("negative", "positive"))
    return folder


BIASES = {"model.tuning": "bias", "model.trainable": ".*", "privacy.accountant": "rdp"}


@pytest.mark.slow
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
    classifier: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        arms.prepare(make_config({"model.path": str(classifier), **changes}), tmp_path / "run")
    logging.get_absl_logger().removeHandler(caplog.handler)
    found = {record.getMessage() for record in caplog.records if "this is the run without" in record.getMessage()}
    assert len(found) == is_warned
