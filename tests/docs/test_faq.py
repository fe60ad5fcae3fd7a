"""The questions were asked in public, each has an answer, and what the answers say of this library is so."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import dp_rmt
from dp_rmt.finetuning.plan import build_mechanism
from dp_rmt.finetuning.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "start" / "faq.md").read_text(encoding="utf-8")
SST2 = {"num_examples": 67_349, "expected_batch_size": 1000, "num_steps": 202, "l2_clip_norm": 0.1}
RUN = {"sampling_probability": 1000 / 67_349, "num_steps": 202}


def answers() -> dict[str, str]:
    return dict(re.findall(r"^### (.*)\n\n((?:(?!^#).*\n?)*)", PAGE, re.MULTILINE))


def test_25_questions_and_more_were_asked_in_public_and_each_has_an_answer() -> None:
    asked = re.compile(r"\[[\w/-]+ \d+\]\(https://github\.com/[\w/-]+/\d+\),?\s*")
    assert sum(bool(asked.search(answer)) for answer in answers().values()) >= 25
    for question, answer in answers().items():
        assert len(asked.sub("", answer).split()) > 10, question


def test_an_infinite_epsilon_switches_off_clipping_and_noise() -> None:
    settings = Settings().changed({"privacy.epsilon": math.inf, "train.num_steps": 3})
    mechanism, _ = build_mechanism(settings, 1000)
    assert (mechanism.l2_clip_norm, mechanism.noise_multiplier) == (math.inf, 0.0)
    clips_alone = dp_rmt.DPSGD(noise_multiplier=0.0, **SST2)
    assert clips_alone.epsilon(1, 1e-5) == math.inf
    gradient, _ = clips_alone.clipped_grad(lambda w, x: x * w)(1.0, jnp.float32([5.0]), is_padding_example=None)
    assert float(gradient) == pytest.approx(0.1 / 1000)


def test_noise_without_clipping_is_refused() -> None:
    with pytest.raises(ValueError, match="l2_clip_norm"):
        dp_rmt.DPSGD(noise_multiplier=1.0, **SST2 | {"l2_clip_norm": math.inf})


def test_the_noise_at_epsilon_3_and_8_is_what_the_page_says() -> None:
    said = re.search(r"less than a third \((\.\d+) and (\.\d+) on SST-2\)", PAGE)
    assert said is not None
    found = [dp_rmt.DPSGD.calibrated(epsilon=target, delta=1e-5, **SST2).noise_multiplier for target in (3.0, 8.0)]
    assert [f"{noise:.3f}".lstrip("0") for noise in found] == list(said.groups())
    assert found[1] > found[0] * 2 / 3


def test_large_targets_have_a_finite_epsilon() -> None:
    for target in (50.0, 1000.0):
        noise = dp_rmt.calibrate_noise_multiplier(epsilon=target, delta=1e-5, **RUN)
        assert 0.9 * target < dp_rmt.epsilon(noise_multiplier=noise, delta=1e-5, **RUN) <= target


def test_epsilon_grows_with_the_steps_and_ends_at_the_target() -> None:
    mechanism = dp_rmt.DPSGD.calibrated(epsilon=3.0, delta=1e-5, accountant="rdp", **SST2)
    spent = [mechanism.epsilon(step, 1e-5) for step in (0, 50, 202)]
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert 2.99 < spent[-1] <= 3.0
