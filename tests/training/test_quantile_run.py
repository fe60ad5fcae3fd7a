"""A run whose clip norm follows a quantile: resumed bit for bit, and its statement."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import make_run

from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.mechanism import DPSGD

MECHANISM = DPSGD(
    num_examples=200,
    expected_batch_size=50,
    num_steps=4,
    noise_multiplier=2.0,
    l2_clip_norm=0.3,
    clip_quantile=QuantileClipping(share=0.19),
)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_with_its_clip_norm(tmp_path: Path) -> None:
    whole = make_run(MECHANISM).train(tmp_path / "whole")
    make_run(MECHANISM).train(tmp_path / "parts", until=2)
    resumed = make_run(MECHANISM).train(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.noise), (resumed.params, resumed.noise))
    assert float(whole.noise.l2_clip_norm) != pytest.approx(0.3, rel=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["clipping/l2_clip_norm"] for line in lines if "clipping/l2_clip_norm" in line]
    assert norms[0] == pytest.approx(0.3)
    assert len(set(norms)) == 4
    page = (tmp_path / "whole" / "privacy.md").read_text()
    assert "begins at 0.3 and follows the 0.5-quantile" in page
    assert "noise of 2.222 times that norm" in page  # 2 / sqrt(1 - 0.19)
    assert "for which 19% of the budget is set apart" in page
    with pytest.raises(ValueError, match="clip_quantile"):
        make_run(
            DPSGD(num_examples=200, expected_batch_size=50, num_steps=4, noise_multiplier=2.0, l2_clip_norm=0.3)
        ).check(tmp_path / "whole")
