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
FIGURES = (Path(__file__).parents[2] / "docs" / "start" / "privacy_in_figures.md").read_text(encoding="utf-8")
SST2 = {"num_examples": 67_349, "expected_batch_size": 1000, "num_steps": 202, "l2_clip_norm": 0.1}
RUN = {"sampling_probability": 1000 / 67_349, "num_steps": 202}


def answers() -> dict[str, str]:
    return dict(re.findall(r"^### (.*)\n\n((?:(?!^#).*\n?)*)", PAGE, re.MULTILINE))


def test_25_questions_and_more_were_asked_in_public_and_each_has_an_answer() -> None:
    asked = re.compile(r"\[[\w/-]+ \d+\]\(https://github\.com/[\w/-]+/\d+\),?\s*")
    assert sum(bool(asked.search(answer)) for answer in answers().values()) >= 25
    for question, answer in answers().items():
        assert len(asked.sub("", answer).split()) > 10, question
        assert re.search(r"\]\((?!https:)[\w./]+\.(md|py)\)", answer), f"{question} names no page"


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
    """As the page on epsilon in figures has it, whose digits a test of its own computes."""
    said = re.search(r"less than a third \((\.\d+) and (\.\d+) on SST-2\)", PAGE)
    assert said is not None
    assert [f"| {target} | 0{noise} |" in FIGURES for target, noise in zip((3, 8), said.groups())] == [True, True]
    assert float(said[2]) > float(said[1]) * 2 / 3


@pytest.mark.thorough
def test_a_large_target_is_met_and_one_that_says_nothing_is_refused() -> None:
    noise = dp_rmt.calibrate_noise_multiplier(epsilon=50.0, delta=1e-5, **RUN)
    assert 49.9 < dp_rmt.epsilon(noise_multiplier=noise, delta=1e-5, **RUN) <= 50
    (largest,) = re.findall(r"the largest epsilon that is accepted \((\d+) on SST-2\)", PAGE)
    with pytest.raises(ValueError, match=f"below 0.2 .* Lower epsilon below {largest}, its value there"):
        dp_rmt.calibrate_noise_multiplier(epsilon=1000.0, delta=1e-5, **RUN)


def test_epsilon_grows_with_the_steps_and_ends_at_the_target() -> None:
    mechanism = dp_rmt.DPSGD.calibrated(epsilon=3.0, delta=1e-5, accountant="rdp", **SST2)
    spent = [mechanism.epsilon(step, 1e-5) for step in (0, 50, 202)]
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert 2.99 < spent[-1] <= 3.0
