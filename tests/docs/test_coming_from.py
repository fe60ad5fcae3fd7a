"""What docs/coming_from says of other libraries, by running both where they are installed."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_rmt
from experiments.benchmarks import calibration
from third_party.peers.optax_driver import make as optax_clipped_sum

RUN = {"sampling_probability": 1000 / 67_349, "num_steps": 202}
DELTA = 1e-5


@pytest.fixture(scope="module")
def jax_privacy():
    return pytest.importorskip("jax_privacy", reason="the extra 'peers'")


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {"x": jnp.asarray(rng.normal(size=(24, 8)), jnp.float32), "y": jnp.asarray(rng.normal(size=24), jnp.float32)}


def losses(params, batch):
    return (batch["x"] @ params - batch["y"]) ** 2


def test_jax_privacys_clipped_gradient_is_ours(jax_privacy, batch):
    params = jnp.ones(8)
    options = {"l2_clip_norm": 0.7, "normalize_by": 20.0, "microbatch_size": 8}
    ours, _ = dp_rmt.clipped_grad(losses, **options)(params, batch, is_padding_example=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optax.global_norm is deprecated", DeprecationWarning)
        theirs_of = jax_privacy.clipped_grad(lambda p, one: losses(p, one)[0], **options)
        theirs = theirs_of(params, batch)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    assert theirs_of.sensitivity() == pytest.approx(0.7 / 20)


def test_jax_privacys_normalize_by_is_1_by_default(jax_privacy, batch):
    theirs = jax_privacy.clipped_grad(lambda p, one: losses(p, one)[0], l2_clip_norm=0.7)
    assert theirs.sensitivity() == pytest.approx(0.7)
    assert dp_rmt.clipped_grad(losses, l2_clip_norm=0.7).sensitivity() == pytest.approx(0.7)


def test_jax_privacys_noise_ends_where_the_page_says(jax_privacy):
    """It calls `jax.random.normal`, whose largest float32 is that of the largest of its 2^23 uniform numbers."""
    import inspect

    assert "sampler=jax.random.normal" in inspect.getsource(jax_privacy.noise_addition)
    largest = math.sqrt(2) * jax.scipy.special.erfinv(jnp.nextafter(jnp.float32(1), jnp.float32(0)))
    assert float(largest) < 5.43


@pytest.mark.parametrize(("accountant", "config"), [("pld", "PldAccountantConfig"), ("rdp", "RdpAccountantConfig")])
def test_jax_privacys_epsilon_is_ours_for_the_same_noise(jax_privacy, accountant, config):
    from jax_privacy import accounting

    theirs_of = accounting.DpsgdTrainingAccountant(getattr(accounting, config)())
    params = accounting.DpParams(noise_multipliers=0.8, batch_size=1000, num_samples=67_349, delta=DELTA)
    theirs = theirs_of.compute_epsilon(202, params)
    ours = dp_rmt.epsilon(noise_multiplier=0.8, delta=DELTA, accountant=accountant, **RUN)
    assert theirs == pytest.approx(ours, rel=2e-3)  # their PLD has steps of 1e-4, and the RDP orders are not the same


def test_jax_privacys_calibration_ends_where_the_page_says(jax_privacy):
    """Up to its tolerance above the smallest noise multiplier; ours is that one."""
    from jax_privacy import accounting

    theirs = accounting.calibrate_noise_multiplier(
        target_epsilon=3.0,
        accountant=accounting.DpsgdTrainingAccountant(accounting.RdpAccountantConfig()),
        batch_sizes=1000,
        num_updates=202,
        num_samples=67_349,
        target_delta=DELTA,
    )
    ours = dp_rmt.calibrate_noise_multiplier(epsilon=3.0, delta=DELTA, accountant="rdp", **RUN)
    assert ours - 1e-4 < theirs < ours + 0.011  # 1e-4: the orders are not the same


def test_our_calibration_ends_where_the_pages_say():
    for target in (3.0, 8.0):
        noise = dp_rmt.calibrate_noise_multiplier(epsilon=target, delta=DELTA, accountant="rdp", **RUN)
        reached = dp_rmt.epsilon(noise_multiplier=noise, delta=DELTA, accountant="rdp", **RUN)
        assert target * (1 - 1e-4) < reached <= target


def test_optaxs_clipped_sum_is_ours(batch):
    ours, _ = dp_rmt.clipped_grad(losses, l2_clip_norm=0.7)(jnp.ones(8), batch, is_padding_example=None)
    theirs = optax_clipped_sum(losses, 0.7, None)(jnp.ones(8), batch)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def optaxs_mean(gradients, noise_multiplier=0.0):
    aggregate = optax.contrib.differentially_private_aggregate(1.0, noise_multiplier=noise_multiplier, key=0)
    mean, _ = aggregate.update(gradients, aggregate.init(None))
    return mean


def test_optax_divides_by_the_rows_that_came(batch):
    """So two rows of padding, of zero gradient, change the mean of six."""
    rows = jnp.full((6, 1), 0.5)
    assert float(optaxs_mean(rows)[0]) == pytest.approx(0.5)
    assert float(optaxs_mean(jnp.concatenate([rows, jnp.zeros((2, 1))]))[0]) == pytest.approx(0.5 * 6 / 8)


def test_optaxs_microbatches_add_the_same_noise_each():
    def noisy_sum(gradients):
        return optaxs_mean(gradients, noise_multiplier=1.0) * len(gradients)

    rows = jnp.zeros((8, 100_000))
    at_once = float(jnp.std(noisy_sum(rows)))
    in_four = float(jnp.std(optax.microbatching.microbatch(noisy_sum, argnums=0, microbatch_size=2)(rows)))
    # The standard deviation of 1e5 draws has a relative error of .22%; these are four of them.
    assert at_once == pytest.approx(1.0, rel=0.01)
    assert in_four == pytest.approx(4.0, rel=0.01)  # the same noise four times: the key is that of the state


def test_one_gradient_that_is_not_finite_makes_optaxs_sum_nan_and_contributes_zero_here(batch):
    broken = {**batch, "y": batch["y"].at[3].set(jnp.nan)}
    assert np.isnan(optax_clipped_sum(losses, 0.7, None)(jnp.ones(8), broken)).all()
    clipped_grad = dp_rmt.clipped_grad(losses, l2_clip_norm=0.7)
    ours, of_examples = clipped_grad(jnp.ones(8), broken, is_padding_example=None)
    without, _ = clipped_grad(jnp.ones(8), batch, is_padding_example=jnp.arange(24) == 3)
    np.testing.assert_array_equal(ours, without)
    assert int((~jnp.isfinite(of_examples.grad_norm)).sum()) == 1


def test_optaxs_noise_in_bfloat16_has_few_values():
    noise = optaxs_mean(jnp.zeros((1, 100_000), jnp.bfloat16), noise_multiplier=1.0)
    assert len(np.unique(np.asarray(noise, np.float32))) < 1000


@pytest.fixture(scope="module")
def opacus_file():
    """Loads one file of Opacus by its path; the package itself imports torch, the files of its accountants do not."""
    spec = importlib.util.find_spec("opacus")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("opacus is not installed (the extra 'peers-torch')")
    (folder,) = spec.submodule_search_locations

    def load(name: str):
        path = Path(folder) / name
        found = importlib.util.spec_from_file_location(f"opacus_{path.stem}", path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module

    return load, Path(folder)


def test_opacus_epsilon_by_renyi_divergences_is_ours(opacus_file):
    load, _ = opacus_file
    rdp = load("accountants/analysis/rdp.py")
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    divergences = rdp.compute_rdp(q=RUN["sampling_probability"], noise_multiplier=0.8, steps=202, orders=orders)
    theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=divergences, delta=DELTA)
    ours = dp_rmt.epsilon(noise_multiplier=0.8, delta=DELTA, accountant="rdp", **RUN)
    assert theirs == pytest.approx(ours, rel=5e-3)


def test_opacus_defaults_are_what_the_page_says(opacus_file):
    _, folder = opacus_file
    engine = (folder / "privacy_engine.py").read_text(encoding="utf-8")
    assert 'accountant: str = "prv"' in engine
    assert "sample_rate = 1 / len(data_loader)" in engine
    assert "expected_batch_size = int(len(data_loader.dataset) * sample_rate)" in engine
    assert 'accountant: str = "rdp"' in (folder / "accountants" / "utils.py").read_text(encoding="utf-8")
    assert (math.ceil(67_349 / 1000), int(67_349 / 68)) == (68, 990)


def test_opacus_clipped_gradient_is_ours(batch):
    """One step of SGD at rate 1 from weights of 1, without noise, by the optimizer that `PrivacyEngine` makes."""
    pytest.importorskip("opacus", reason="the extra 'peers-torch'")
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    x, y = (torch.from_numpy(np.array(batch[key])) for key in "xy")
    model = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    wrapped = GradSampleModule(model)
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DPOptimizer(plain, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=20)
    x.requires_grad_()  # without it torch warns about Opacus' hooks
    ((wrapped(x)[:, 0] - y) ** 2).mean().backward()
    optimizer.step()

    clipped = dp_rmt.clipped_grad(losses, l2_clip_norm=0.7, normalize_by=20.0)
    ours, _ = clipped(jnp.ones(8), batch, is_padding_example=None)
    np.testing.assert_allclose(1 - model.weight.detach().numpy()[0], ours, atol=3e-7)  # a step from 1 rounds to 1.2e-7


def test_opacus_calibration_ends_where_the_page_says():
    """Up to its tolerance in epsilon below the target."""
    pytest.importorskip("opacus", reason="the extra 'peers-torch'")
    noise = calibration.of_opacus(calibration.Promise(3.0, DELTA, 67_349, 1000, 202), "rdp")
    reached = dp_rmt.epsilon(noise_multiplier=noise, delta=DELTA, accountant="rdp", **RUN)
    assert 3.0 - 0.01 - 0.005 < reached < 3.0 + 0.005  # .005: the orders are not the same
