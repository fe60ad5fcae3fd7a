"""The sentences of the statement about choices: each stands where it is true, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from dp_rmt.reporting.privacy_files import markdown
from dp_rmt.reporting.privacy_statement import PrivacyStatement

STATEMENT = {
    "epsilon": 3.0,
    "target_epsilon": None,
    "delta": 1e-5,
    "epsilon_pld": None,
    "epsilon_rdp": None,
    "noise_multiplier": 2.0,
    "l2_clip_norm": 0.1,
    "clip": "flat",
    "sampling_probability": 0.02,
    "expected_batch_size": 200.0,
    "max_batch_size": 400,
    "num_steps": 4,
    "num_examples": 10_000,
    "noise_std": 1e-3,
    "seeds_from": "os entropy",
    "nonprivate_metrics": False,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"selected_among": "geometric, mean 6"}, "chosen as the best of a secret random number of runs"),
        ({"clip_quantile": (0.5, 0.01)}, "begins at 0.1 and follows the 0.5-quantile"),
        ({"compares_raw_losses": True}, "it is for public data only"),
        ({"noise_generator": "chacha20"}, "The noise came from ChaCha20 (RFC 8439)"),
    ],
)
def test_a_choice_has_its_sentence(change: dict[str, Any], sentence: str) -> None:
    assert sentence not in markdown(PrivacyStatement(**STATEMENT))  # type: ignore[arg-type]
    changed = PrivacyStatement(**(STATEMENT | change))  # type: ignore[arg-type]
    assert sentence in markdown(changed)
    assert sentence in markdown(PrivacyStatement.from_json(changed.to_json()))
