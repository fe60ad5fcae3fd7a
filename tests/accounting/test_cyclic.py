"""Groups that take turns: the rounds of a run, what an overflow costs, and the epsilon of dp_accounting and others."""

from __future__ import annotations

import dataclasses
import math

import dp_accounting
import pytest
from dp_accounting.pld import pld_privacy_accountant
from scipy import stats

from dp_rmt import accounting
from dp_rmt.accounting import Truncation, batch_size_without_overflow, rounds_of_run
from dp_rmt.accounting.cyclic import RARE
from dp_rmt.correlated_noise import square_root
from dp_rmt.mechanism import DPSGD

BANDS = 4
MECHANISM = DPSGD(
    num_examples=2000,
    expected_batch_size=100,
    num_steps=30,
    noise_multiplier=1.1,
    l2_clip_norm=1.0,
    noise_strategy=square_root(BANDS),
)
DELTA = 1e-5


def by_dp_accounting(updates: int, accountant: dp_accounting.PrivacyAccountant) -> float:
    """BandMF's theorem, written down once more: ceil(T / b) rounds, each a Gaussian sampled with b q."""
    event = dp_accounting.PoissonSampledDpEvent(BANDS * 0.05, dp_accounting.GaussianDpEvent(1.1))
    return accountant.compose(event, math.ceil(updates / BANDS)).get_epsilon(DELTA)


@pytest.mark.parametrize("updates", [1, 4, 5, 30])
def test_epsilon_is_that_of_dp_accounting(updates: int) -> None:
    ours = MECHANISM.epsilon(updates, DELTA)
    assert ours == pytest.approx(by_dp_accounting(updates, pld_privacy_accountant.PLDAccountant()), rel=2e-3)
    rdp = MECHANISM.epsilon(updates, DELTA, "rdp")
    assert rdp == pytest.approx(by_dp_accounting(updates, dp_accounting.rdp.RdpAccountant()), rel=2e-2)
    assert rdp > ours


def test_epsilon_is_that_of_jax_privacy() -> None:
    peer = pytest.importorskip("jax_privacy.experimental.accounting", reason="the extra 'peers'")
    event = peer.amplified_bandmf_event(1.1, 30, num_bands=BANDS, sampling_prob=BANDS * 0.05)
    epsilon = pld_privacy_accountant.PLDAccountant().compose(event).get_epsilon(DELTA)
    assert MECHANISM.epsilon(30, DELTA) == pytest.approx(epsilon, rel=2e-3)


def test_calibration_ends_at_its_target() -> None:
    options = {field.name: getattr(MECHANISM, field.name) for field in dataclasses.fields(MECHANISM)}
    del options["noise_multiplier"]
    found = DPSGD.calibrated(epsilon=2.0, delta=DELTA, **options)
    assert 2.0 * (1 - 1e-4) <= found.epsilon(30, DELTA) <= 2.0
    with pytest.raises(ValueError, match="raise max_batch_size"):
        DPSGD.calibrated(epsilon=2.0, delta=DELTA, **(options | {"max_batch_size": 110}))


def test_an_overflow_is_paid_for_by_delta() -> None:
    tight = dataclasses.replace(MECHANISM, max_batch_size=145)
    overflow = math.ceil(30 / BANDS) * stats.binom.sf(144, 1999, 0.05)  # the others fill the batch
    assert 1e-5 < overflow < 1e-3
    assert tight.epsilon(30, DELTA) == math.inf
    assert tight.epsilon_by_accountant(30, DELTA) == {"pld": math.inf, "rdp": math.inf}
    delta = 1e-3
    assert tight.epsilon(30, delta) == pytest.approx(MECHANISM.epsilon(30, delta - overflow), rel=1e-9)
    assert tight.delta_of_truncation(30) == pytest.approx(overflow, rel=1e-6)
    more = tight.largest_true_positive_rate(30, 0.01) - MECHANISM.largest_true_positive_rate(30, 0.01)
    assert overflow <= more < 3 * overflow


def test_one_group_is_the_run_as_it_is() -> None:
    shape = Truncation(2000, 150)
    assert rounds_of_run(num_groups=1, sampling_probability=0.05, num_steps=30, truncation=shape) == (
        0.05,
        30,
        shape,
        0.0,
    )
    one = dataclasses.replace(MECHANISM, noise_strategy=square_root(1), max_batch_size=None)
    plain = dataclasses.replace(one, noise_strategy=None)
    assert one.max_batch_size == plain.max_batch_size
    assert one.epsilon(30, DELTA) == plain.epsilon(30, DELTA)


@pytest.mark.parametrize(("num_examples", "q"), [(1, 0.5), (10, 0.25), (2000, 0.05), (67_349, 1000 / 67_349)])
def test_the_batch_shape_holds_every_sample(num_examples: int, q: float) -> None:
    size = batch_size_without_overflow(num_examples, q, 50)
    assert 50 * stats.binom.sf(size - 1, num_examples - 1, q) <= RARE
    assert size == 1 or 50 * stats.binom.sf(size - 2, num_examples - 1, q) > RARE
    assert batch_size_without_overflow(num_examples, q, 50, multiple_of=16) == -(-size // 16) * 16


def test_more_groups_than_the_data_has_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="Let num_groups be at most 20"):
        rounds_of_run(num_groups=21, sampling_probability=0.05, num_steps=30, truncation=None)
    full = rounds_of_run(num_groups=20, sampling_probability=0.05, num_steps=30, truncation=None)
    assert full.sampling_probability == 1.0
    gaussian = accounting.epsilon(noise_multiplier=1.1, delta=DELTA, sampling_probability=1.0, num_steps=2)
    assert accounting.epsilon(
        noise_multiplier=1.1, delta=DELTA, sampling_probability=full.sampling_probability, num_steps=full.num_steps
    ) == pytest.approx(gaussian, rel=1e-9)
