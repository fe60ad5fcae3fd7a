"""`dp-rmt doctor` passes on a sound machine, and names what is broken on one that is not."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import dp_rmt
from dp_rmt import noise_addition
from dp_rmt.clipping import per_example
from dp_rmt.finetuning import console, doctor


@pytest.mark.parametrize("test", doctor.TESTS.values(), ids=doctor.TESTS)
def test_a_sound_machine_passes(test):
    finding = test()
    assert finding.is_right, finding.text


def with_short_tails(add):
    """The noise as `jax.random.normal` would draw it: the right mean and deviation, and no tails."""
    return lambda high, low, dtype=jnp.float32: jnp.clip(add(high, low, dtype), -5.42, 5.22)


def test_noise_without_tails_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "normal_of_words", with_short_tails(noise_addition.normal_of_words))
    assert not doctor.sound_noise().is_right


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_noise_of_another_size_is_found(monkeypatch, factor):
    draw = noise_addition.standard_normal
    monkeypatch.setattr(noise_addition, "standard_normal", lambda *args: factor * draw(*args))
    assert not doctor.sound_noise().is_right


def test_noise_that_is_the_same_at_every_step_is_found(monkeypatch):
    draw, key = noise_addition.standard_normal, noise_addition.noise_key(1)
    monkeypatch.setattr(noise_addition, "standard_normal", lambda _, *args: draw(key, *args))
    assert not doctor.sound_noise().is_right


def test_clipping_to_another_norm_is_found(monkeypatch):
    factors = per_example.clip_factors
    monkeypatch.setattr(
        per_example,
        "clip_factors",
        lambda norms, *, l2_clip_norm, clip: 1.001 * factors(norms, l2_clip_norm=1, clip=clip),
    )
    assert not doctor.sound_clipping().is_right


@pytest.mark.parametrize("factor", [0.999, 1.01])
def test_an_epsilon_that_is_wrong_is_found(monkeypatch, factor):
    right = doctor.epsilon
    monkeypatch.setattr(doctor, "epsilon", lambda **arguments: factor * right(**arguments))
    assert not doctor.sound_accounting().is_right


def test_the_report_says_what_failed_and_ends_with_an_error(monkeypatch, capsys):
    tests = {"noise": lambda: doctor.Finding(True, "fine"), "clipping": lambda: doctor.Finding(False, "0.5 (1)")}
    monkeypatch.setattr(doctor, "TESTS", tests)
    text, passed = doctor.examine()
    assert not passed
    assert "ok   noise: fine" in text
    assert "FAIL clipping: 0.5 (1)" in text
    assert "do not train on private data" in text
    assert dp_rmt.__version__ in text
    monkeypatch.setattr(console, "_run", lambda run, argv: run())
    with pytest.raises(SystemExit) as ended:
        console.doctor(["dp-rmt doctor"])
    assert ended.value.code == 1
    assert "FAIL clipping" in capsys.readouterr().out
