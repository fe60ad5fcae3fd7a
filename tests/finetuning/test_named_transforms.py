"""What a config names is the library's own call, and a wrong name or option is refused with the one that was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import sst2_methods
from dp_rmt import DPSGD, Kappa, TracyWidom, denoise_matrices, scale_by_denoised_adam
from dp_rmt.baselines.adam_bc import adam_bc
from dp_rmt.baselines.filters import kalman_filter, low_pass_filter
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.muon_bc import muon_bc
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.joins import layers_side_by_side, reads_the_stream, shared_inputs
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.stages import build_transforms, check_transforms, learning_rate_schedule
from dp_rmt.training.advice import StepQuality
from dp_rmt.training.partitioning import data_mesh

pytestmark = pytest.mark.thorough

MECHANISM = DPSGD(num_examples=1000, expected_batch_size=100, num_steps=30, noise_multiplier=1.0, l2_clip_norm=1.0)
STD = MECHANISM.noise_std
STREAM: dict[str, Any] = {"matrix_rule": layers_side_by_side, "join": reads_the_stream}
AT_ONE_PERCENT = TracyWidom(0.01)


def adamw(rate: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)


def denoised(**options: Any) -> optax.GradientTransformation:
    return denoise_matrices(STD, svd="subspace", **options)


def of_moment(**options: Any) -> Callable[[Any], optax.GradientTransformation]:
    def make(rate: Any) -> optax.GradientTransformation:
        scaled = scale_by_denoised_adam(STD, gate=AT_ONE_PERCENT, svd="subspace", **options)
        return optax.chain(scaled, optax.add_decayed_weights(0.0), optax.scale_by_learning_rate(rate))

    return make


CALLS: dict[str, tuple[optax.GradientTransformation, Callable[[Any], Any]]] = {
    "dp_adam": (optax.identity(), adamw),
    "paper": (denoised(gate=Kappa(1.0)), adamw),
    "partial": (denoised(below_edge="keep"), adamw),
    "tracy_widom": (denoised(gate=AT_ONE_PERCENT), adamw),
    "stein": (denoised(gate=AT_ONE_PERCENT, blend="stein"), adamw),
    "stream": (denoised(gate=AT_ONE_PERCENT, **STREAM), adamw),
    "stream_moment_adam": (optax.identity(), of_moment(second_moment="denoised", **STREAM)),
    "moment": (optax.identity(), of_moment()),
    "moment_adam": (optax.identity(), of_moment(second_moment="denoised")),
    "moment_stein": (optax.identity(), of_moment(blend="stein")),
    "hard_threshold": (denoised(shrinker="hard_threshold", rescale="none"), adamw),
    "truncate_rank": (truncate_rank(4), adamw),
    "low_pass": (low_pass_filter(), adamw),
    "kalman": (optax.identity(), lambda rate: kalman_filter(adamw(rate), kappa=0.7)),
    "muon": (optax.identity(), lambda rate: private_muon(rate, adamw(rate), consistent_rms=0.2)),
}
ARMS = arm_settings(Settings.from_config(sst2_methods.get_config()))


def updates_of(denoise: optax.GradientTransformation, optimizer: optax.GradientTransformation) -> list[Any]:
    """Three updates of noisy gradients with a signal."""
    params = {
        "layers": {name: {"kernel": jnp.full((2, 12, 16), 0.1)} for name in ("query", "key")},
        "bias": jnp.ones(16),
    }
    first, second = denoise.init(params), optimizer.init(params)

    @jax.jit
    def step(gradient: Any, first: Any, second: Any) -> Any:
        clean, first = denoise.update(gradient, first, params)
        update, second = optax.with_extra_args_support(optimizer).update(clean, second, params, noisy=gradient)
        return update, first, second

    rng, found = np.random.default_rng(0), []
    for _ in range(3):
        gradient = jax.tree.map(lambda p: (0.02 + STD * rng.normal(size=p.shape)).astype(np.float32), params)
        update, first, second = step(gradient, first, second)
        found.append(update)
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_a_named_transform_is_the_call_of_the_library(arm: str) -> None:
    """Bit for bit, step after step; compiled together with the advice, the last bit may be rounded otherwise."""
    stages = build_transforms(ARMS[arm].changed({"train.advice": False}), MECHANISM, 0, data_mesh(jax.devices()[:1]))
    denoise, optimizer = CALLS[arm]
    expected = updates_of(denoise, optimizer(learning_rate_schedule(ARMS[arm].train, 30)))
    jax.tree.map(np.testing.assert_array_equal, updates_of(stages.denoise, stages.optimizer), expected)


@pytest.mark.parametrize(
    ("optimizer", "left"),
    [
        (("denoised_adam", {"b1": 0.5, "second_moment": "denoised"}), optax.adamw(1.0, b1=0.5, weight_decay=0.0)),
        (("kalman_filter", {"optimizer": ("adamw", {"b2": 0.5})}), optax.adamw(1.0, b2=0.5)),
        (("adam_bc", {"b1": 0.5, "floor": 1.0}), optax.adamw(1.0, b1=0.5, weight_decay=0.0)),
    ],
)
def test_without_noise_the_ordinary_optimizer_is_left(optimizer: Any, left: optax.GradientTransformation) -> None:
    settings = Settings().changed({"train": {"learning_rate": 1.0, "schedule": "constant"}, "optimizer": optimizer})
    mechanism = DPSGD(num_examples=10, expected_batch_size=5, num_steps=2, noise_multiplier=0.0, l2_clip_norm=np.inf)
    stages = build_transforms(settings, mechanism, 0, data_mesh(jax.devices()[:1]))
    expected = updates_of(optax.identity(), left)
    jax.tree.map(np.testing.assert_array_equal, updates_of(stages.denoise, stages.optimizer), expected)


@pytest.mark.parametrize(
    ("optimizer", "call"),
    [
        (("adam_bc", {"b2": 0.99, "floor": 1e-8}), lambda rate: adam_bc(rate, STD, b2=0.99, floor=1e-8)),
        (
            ("muon_bc", {"others": "adamw", "beta": 0.9, "num_probes": 2}),
            lambda rate: muon_bc(rate, STD, optax.adamw(rate), beta=0.9, num_probes=2),
        ),
    ],
    ids=["adam_bc", "muon_bc"],
)
def test_corrected_optimizers_get_the_noise_of_the_run(optimizer: Any, call: Any) -> None:
    settings = Settings().changed({"denoise": (), "optimizer": optimizer})
    stages = build_transforms(settings, MECHANISM, 0, data_mesh(jax.devices()[:1]))
    expected = updates_of(optax.identity(), call(learning_rate_schedule(settings.train, 30)))
    jax.tree.map(np.testing.assert_array_equal, updates_of(stages.denoise, stages.optimizer), expected)


def test_the_average_comes_after_the_learning_rate_and_is_published() -> None:
    train = {"average_iterates": 0.5, "learning_rate": 0.1, "schedule": "constant", "advice": False}
    changes = {"train": train, "denoise": ()}
    stages = build_transforms(Settings().changed(changes), MECHANISM, 0, data_mesh(jax.devices()[:1]))
    assert stages.published is not None
    x, iterates = {"bias": jnp.zeros(3)}, []
    state = stages.optimizer.init(x)
    for _ in range(2):
        updates, state = stages.optimizer.update({"bias": jnp.ones(3)}, state, x)
        x = optax.apply_updates(x, updates)
        iterates.append(x["bias"])
    np.testing.assert_allclose(x["bias"], -0.2, rtol=1e-4)  # two steps of Adam, which are of the learning rate
    np.testing.assert_allclose(stages.published(state, x)["bias"], (iterates[0] + 2 * iterates[1]) / 3, rtol=1e-6)


@pytest.mark.parametrize(("noise_multiplier", "advice"), [(1.0, True), (1.0, False), (0.0, True)])
def test_steps_are_measured_where_there_is_noise_and_the_setting_says_so(noise_multiplier: float, advice: bool) -> None:
    settings = Settings().changed({"train.advice": advice})
    options = {"l2_clip_norm": 1.0 if noise_multiplier else np.inf, "noise_multiplier": noise_multiplier}
    mechanism = DPSGD(num_examples=10, expected_batch_size=5, num_steps=2, **options)
    stages = build_transforms(settings, mechanism, 0, data_mesh(jax.devices()[:1]))
    state = stages.optimizer.init({"kernel": jnp.ones((8, 8))})
    assert isinstance(state, StepQuality) == (advice and noise_multiplier > 0)


def test_stages_follow_each_other() -> None:
    settings = Settings().changed(
        {"denoise": ("denoise_matrices", ("truncate_rank", {"rank": 1})), "optimizer": "adamw"}
    )
    stages = build_transforms(settings, MECHANISM, 0, data_mesh(jax.devices()[:1]))
    chained = optax.chain(denoise_matrices(STD), truncate_rank(1))
    expected = updates_of(chained, optax.adamw(learning_rate_schedule(settings.train, 30)))
    jax.tree.map(np.testing.assert_array_equal, updates_of(stages.denoise, stages.optimizer), expected)


def test_a_rule_is_named_too() -> None:
    settings = Settings().changed({"denoise": (("denoise_matrices", {"join": "shared_inputs"}),)})
    stages = build_transforms(settings, MECHANISM, 0, data_mesh(jax.devices()[:1]))
    expected = updates_of(denoise_matrices(STD, join=shared_inputs), optax.identity())
    jax.tree.map(np.testing.assert_array_equal, updates_of(stages.denoise, optax.identity()), expected)


def matrices(**options: Any) -> dict[str, Any]:
    return {"denoise": (("denoise_matrices", options),)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"denoise": ("truncate_ranks",)},
            r"config.denoise\[0\]: there is no 'truncate_ranks'; did you mean 'truncate",
        ),
        ({"optimizer": "adam"}, "config.optimizer: there is no 'adam'; did you mean 'adamw'"),
        (
            matrices(shrinkr="nuclear"),
            r"config.denoise\[0\]: denoise_matrices has no option 'shrinkr'; did you mean 'shr",
        ),
        (matrices(noise_std=1.0), "denoise_matrices has no option 'noise_std'"),
        (matrices(shrinker="soft"), "denoise_matrices: shrinker must be one of frobenius, .* got 'soft'"),
        (matrices(gate=("kappa", {"kappa": -1.0})), "gate: kappa: kappa must be at least 0, got -1.0"),
        (matrices(gate="kapa"), "gate: there is no 'kapa'; did you mean 'kappa'"),
        (matrices(gate=("tracy_widom", {"false_alarm": 0.5})), "tracy_widom: false_alarm must be from 1e-09 to 0.1"),
        (matrices(gate=("kappa", {"per": "row"})), "per must be one of layer, component, got 'row'"),
        (matrices(gate=3), r"gate must be text or \(text, a dictionary\), got 3"),
        (matrices(join="shared"), "join: there is no 'shared'; .*shared_inputs"),
        (matrices(shrinker="optshrink", svd="subspace"), "it needs svd='exact'"),
        ({"denoise": (("truncate_rank", {"rank": 2.5}),)}, "truncate_rank: rank must be an integer, got 2.5"),
        ({"denoise": (("truncate_rank", {"rank": 0}),)}, "rank must be at least 1, got 0"),
        ({"optimizer": ("adamw", {"b1": 1.0})}, "config.optimizer: adamw: b1 must be at least 0 and below 1, got 1.0"),
        ({"optimizer": ("adamw", {"eps": 0.0})}, "config.optimizer: adamw: eps must be above 0, got 0.0"),
        ({"optimizer": ("adamw", {"weight_decay": -1})}, "weight_decay must not be negative, got -1.0"),
        ({"optimizer": ("adamw", {"b2": "high"})}, "adamw: b2 must be a number, got 'high'"),
        ({"optimizer": ("adamw", {"second_moment": "denoised"})}, "adamw has no option 'second_moment'"),
        ({"optimizer": "kalman_filter"}, "config.optimizer: kalman_filter needs the option 'optimizer'"),
        ({"optimizer": ("kalman_filter", {"optimizer": "adamw", "kappa": 1.5})}, "kappa must be above 0 and at most 1"),
        ({"optimizer": ("kalman_filter", {"optimizer": "denoised_adam"})}, "optimizer: there is no 'denoised_adam'"),
        ({"optimizer": "denoised_adam"}, "denoised_adam works at the noise level of the gradient itself"),
        ({"optimizer": "adam_bc"}, "adam_bc works at the noise level of the gradient itself"),
        ({"optimizer": ("muon_bc", {"others": "adamw"})}, "muon_bc works at the noise level of the gradient itself"),
        ({"denoise": (), "optimizer": "muon_bc"}, "config.optimizer: muon_bc needs the option 'others'"),
        ({"denoise": (), "optimizer": ("adam_bc", {"floor": 0.0})}, "adam_bc: .*floor must be above 0"),
        ({"denoise": (), "optimizer": ("adam_bc", {"flor": 1.0})}, "adam_bc has no option 'flor'; did you mean 'floor"),
        (
            {"denoise": (), "optimizer": ("muon_bc", {"others": "adamw", "num_probes": 0})},
            "muon_bc: .*num_probes must be at least 1",
        ),
        (
            {"train.average_iterates": 0.5, "optimizer": ("kalman_filter", {"optimizer": "adamw"})},
            "config.train.average_iterates=0.5 does not go with config.optimizer kalman_filter",
        ),
        (
            {"denoise": (), "optimizer": ("denoised_adam", {"noise_correction": 0.0})},
            "noise_correction must be above 0",
        ),
        (
            {"denoise": ("low_pass_filter", "denoise_matrices")},
            r"config.denoise\[1\]: denoise_matrices works at the noise level of the gradient itself",
        ),
    ],
)
def test_a_wrong_name_or_option_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^config.*{message}|^{message}"):
        check_transforms(Settings().changed(changes))
