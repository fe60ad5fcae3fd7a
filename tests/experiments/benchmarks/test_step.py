"""The step profiler on tiny models: the command, its record, what it says of arms that cannot run, and its peers."""

from __future__ import annotations

import doctest
import functools
import json
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import clipped_grad
from dp_rmt.geometry.whitening import coordinates_of
from experiments.benchmarks import matrix_flops, rounds
from experiments.benchmarks import update as profile_update
from experiments.benchmarks.step import (
    measure as profile_measure,
)
from experiments.benchmarks.step import (
    programs as profile_programs,
)
from experiments.benchmarks.step import (
    table as profile_table,
)
from experiments.benchmarks.step import (
    torch_peers as profile_torch,
)
from experiments.benchmarks.step.models import MODELS, Workload, make_workload
from third_party import peers

pytestmark = pytest.mark.slow

SETTINGS: Any = {"repeats": 2, "l2_clip_norm": 1.0, "sizes": [2], "memory_budget": 1e9, "progress": lambda line: None}


@pytest.fixture(scope="module")
def commands(run_side_by_side: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Four commands, run side by side."""
    arguments = {
        "good": ["--model=tiny", "--num_layers=1", "--arms=plain,vmap,ghost", "--microbatch_sizes=4,2", "--repeats=2"],
        "updates": ["--model=tiny", "--updates=subspace,gram,whitened_before", "--microbatch_sizes=2", "--repeats=2"],
        "unknown_model": ["--model=huge"],
        "unknown_arm": ["--model=tiny", "--arms=plain,magic"],
    }
    command = ["-W", "error", "-m", "experiments.benchmarks.step.main", "--batch_size=4", "--sequence_length=8"]
    return run_side_by_side(command, "--results", arguments)


def test_a_record_holds_all_rounds_and_what_follows_from_them(commands: dict[str, Any]) -> None:
    ended = commands["good"]
    assert ended.code == 0, ended.stderr
    (path,) = ended.folder.iterdir()
    assert path.name == "tiny-cpu-float32-b4-s8-l1.json"
    record = json.loads(path.read_text())
    assert record["shapes"]["config"]["num_layers"] == 1
    assert (record["shapes"]["batch_size"], record["shapes"]["sequence_length"]) == (4, 8)
    assert record["clipped_fraction"] == 1.0  # else the sums would agree whatever the norms are
    assert record["versions"]["jax"] == jax.__version__
    assert record["machine"]["cores"] >= 1
    assert list(record["arms"]) == ["plain", "vmap", "ghost"]
    plain = record["arms"]["plain"]
    for arm, numbers in record["arms"].items():
        assert numbers["reason"] is None
        seconds = numbers["seconds_of_rounds"]
        assert len(seconds) == 2
        assert min(seconds) > 0
        assert numbers["seconds"] == statistics.median(seconds)
        ratios = [a / b for a, b in zip(seconds, plain["seconds_of_rounds"])]
        assert numbers["time_ratio"] == pytest.approx(statistics.median(ratios))
        assert numbers["examples_per_second"] == pytest.approx(4 / numbers["seconds"])
        assert numbers["temp_bytes_ratio"] == pytest.approx(numbers["temp_bytes"] / plain["temp_bytes"])
        assert numbers["peak_bytes"] is None  # the CPU does not tell
        assert ("relative_error" in numbers) == (arm == "ghost")
    assert [trial["microbatch_size"] for trial in record["arms"]["vmap"]["trials"]] == [None, 2]
    # Ghost clipping pulls back twice, and only the second time to the parameters.
    assert 1.2 < record["arms"]["ghost"]["matrix_flops_ratio"] < 2


def test_the_table_has_a_row_for_each_arm(commands: dict[str, Any]) -> None:
    lines = commands["good"].stdout.splitlines()
    (header,) = [number for number, line in enumerate(lines) if line.startswith("arm")]
    assert "time/plain" in lines[header]
    assert [line.split()[:2] for line in lines[header + 1 : header + 2]] == [["plain", "1.000"]]
    assert [line.split()[0] for line in lines[header + 1 : header + 4]] == ["plain", "vmap", "ghost"]
    assert len({len(line) for line in lines[header : header + 4]}) == 1  # columns stand below each other


def test_updates_are_compared_with_the_noisy_one(commands: dict[str, Any]) -> None:
    ended = commands["updates"]
    assert ended.code == 0, ended.stderr
    (path,) = ended.folder.iterdir()
    assert path.name == "tiny-cpu-float32-b4-s8-l2-updates.json"
    updates = json.loads(path.read_text())["updates"]
    assert list(updates) == ["noisy", "subspace", "gram", "whitened_before"]
    assert updates["noisy"]["time_ratio"] == 1
    for numbers in updates.values():
        assert len(numbers["seconds_of_rounds"]) == 2
        assert numbers["microbatch_size"] == 2
        assert numbers["temporary_bytes"] > 0
    # Behind the optimizer the maps are products; before the clipping the norms are, too.
    assert 1 < updates["whitened_before"]["matrix_flops_ratio"] < 2
    # One map for what attention reads, and one each for output, both parts of the feed-forward, pooler and head: of
    # 17 and 33 inputs with their biases, whole because the rank is larger.
    maps = {name: numbers["state_bytes"] - updates["noisy"]["state_bytes"] for name, numbers in updates.items()}
    per_layer = 4 * (3 * (1 + 17 * 17) + (1 + 33 * 33))
    assert maps["whitened_before"] == 2 * per_layer + 4 * 2 * (1 + 17 * 17)
    assert any(line.startswith("subspace ") for line in ended.stdout.splitlines())


def test_an_update_is_the_sum_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoised or not, it is Adam's first step on the noisy clipped gradient."""
    monkeypatch.setattr(profile_update, "NOISE_MULTIPLIER", 0.01)  # little enough for four examples to show
    workload = make_workload("tiny", batch_size=4, sequence_length=8, dtype="float32", num_layers=1)
    given: Any = {"l2_clip_norm": 1.0, "microbatch_size": 2}

    def first_update(arm: str) -> tuple[Any, Any, Any]:
        update, state = profile_update.make_update(workload, arm, **given)
        return jax.jit(update)(workload.trainable, workload.frozen, workload.batch, state)

    noisy, per_example, _ = first_update("noisy")
    denoised, _, _ = first_update("gram")
    whitened, same, state = first_update("whitened_after")
    expected = coordinates_of(state)(noisy)
    for one, two in zip(jax.tree.leaves(whitened), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(same.grad_norm, per_example.grad_norm, rtol=1e-5)
    _, mapped, _ = first_update("whitened_before")
    assert float(jnp.min(jnp.abs(mapped.grad_norm / per_example.grad_norm - 1))) > 1e-3  # those of V, and not of W
    assert per_example.grad_norm.shape == (4,)
    for leaf in jax.tree.leaves(noisy):  # g / (|g| + 1e-8), hardly an entry being so small
        assert float(jnp.max(jnp.abs(leaf))) <= 1
        assert float(jnp.median(jnp.abs(leaf))) == pytest.approx(1, rel=1e-3)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), noisy, denoised)
    matrices = changed["encoder"]["layers"]["attention"]["query"]
    assert not matrices["bias"]
    assert any(jax.tree.leaves(changed))


def test_unknown_names_end_in_one_line(commands: dict[str, Any]) -> None:
    model, arm = commands["unknown_model"], commands["unknown_arm"]
    assert model.code != 0
    assert "--model=huge: value should be one of <roberta_base|" in model.stderr
    assert arm.code != 0
    assert arm.stderr.splitlines()[-1].startswith("main: --arms=magic is unknown; choose among plain, vmap, ")
    assert "Traceback" not in model.stderr + arm.stderr
    assert not model.folder.exists()
    assert not arm.folder.exists()


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Linear regression without a model: quick to compile, and ghost clipping has no rule for it."""
    monkeypatch.setattr(profile_measure, "matrix_rate", lambda dtype: 1e9)
    batch_Bx3 = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    def losses(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.square(batch @ trainable["kernel"] - frozen)

    config: Any = SimpleNamespace(dtype=jnp.float32)
    return Workload(config, losses, {"kernel": jnp.array([0.1, -0.2, 0.3])}, jnp.array(0.5), batch_Bx3)


def test_an_arm_that_is_refused_shows_the_reason(linear: Workload) -> None:
    arms = profile_measure.measure(linear, ["ghost", "vmap"], **SETTINGS)["arms"]
    assert arms["ghost"]["reason"].startswith("refused: ")
    assert "kernel" in arms["ghost"]["reason"]
    assert "seconds" not in arms["ghost"]
    assert arms["vmap"]["seconds"] > 0


def test_a_missing_peer_is_reported(linear: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = peers.TORCH._replace(packages=("torch", "no_such_package"))
    monkeypatch.setattr(profile_torch, "TORCH", missing)
    monkeypatch.setitem(peers.JAX_PEERS, "jax_privacy", missing._replace(extra="peers"))
    measured = profile_measure.measure(linear, ["jax_privacy"], **SETTINGS)
    assert measured["arms"]["jax_privacy"]["reason"] == "not installed: pip install -e .[peers]"
    torch = profile_torch.measure_torch(
        "tiny",
        batch_size=2,
        sequence_length=8,
        dtype="float32",
        num_layers=1,
        repeats=1,
        l2_clip_norm=1.0,
        progress=lambda line: None,
    )
    assert torch == {"reason": "not installed: pip install -e .[peers-torch]"}
    shapes = {"config": {"num_layers": 1}, "trainable_parameters": 3, "batch_size": 4, "sequence_length": 1}
    machine = {"device_kind": "cpu", "cpu": "a", "cores": 1}
    table = profile_table.render(
        {"model": "m", "dtype": "float32", "repeats": 2, "shapes": shapes, "machine": machine, "torch": torch}
        | measured
    )
    assert "jax_privacy: not installed: pip install -e .[peers]" in table
    assert "not installed: pip install -e .[peers-torch]" in table


def test_a_program_above_the_memory_budget_is_not_run(linear: Workload) -> None:
    program = profile_programs.compile_program(linear, "vmap", l2_clip_norm=1.0, memory_budget=1.0)
    assert program.reason is not None
    assert program.reason.startswith("does not fit")


def test_a_wrong_sum_is_an_error(linear: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(losses: Any, l2_clip_norm: float, microbatch_size: int | None) -> Any:
        return jax.grad(lambda params, batch: jnp.sum(losses(params, batch)))

    monkeypatch.setattr(profile_programs, "jax_driver", lambda name: unclipped)
    with pytest.raises(RuntimeError, match=r"optax: its sum of clipped gradients differs from that of dp_rmt"):
        profile_measure.measure(linear, ["optax"], **SETTINGS | {"l2_clip_norm": 0.01})


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("peer", list(peers.JAX_PEERS))
def test_drivers_give_the_sum_of_clipped_grad(linear: Workload, peer: str, microbatch_size: int | None) -> None:
    try:
        make = peers.jax_driver(peer)
    except peers.NotInstalledError as error:
        pytest.skip(f"{peer} is {error}")

    def losses(params: Any, batch: Any) -> jax.Array:
        return linear.per_example_losses(params, linear.frozen, batch)

    reference, per_example = clipped_grad(losses, l2_clip_norm=0.3)(
        linear.trainable, linear.batch, is_padding_example=None
    )
    assert 0 < jnp.sum(per_example.grad_norm > 0.3) < 4  # some examples are clipped, some are not
    gradient = make(losses, 0.3, microbatch_size)(linear.trainable, linear.batch)
    np.testing.assert_allclose(gradient["kernel"], reference["kernel"], rtol=1e-5, atol=1e-7)  # rounding of float32


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tiny")])
def test_models_have_one_loss_per_example(name: str) -> None:
    workload = make_workload(name, batch_size=3, sequence_length=5, dtype="bfloat16", num_layers=1)
    losses = jax.eval_shape(workload.per_example_losses, workload.trainable, workload.frozen, workload.batch)
    assert (losses.shape, losses.dtype) == ((3,), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(workload.trainable)} == {jnp.dtype(jnp.float32)}
    is_lora = ["lora_" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(workload.trainable)]
    assert all(is_lora) if name.endswith("lora") else not any(is_lora)
    assert bool(jax.tree.leaves(workload.frozen)) == name.endswith("lora")
    assert workload.shapes()["config"]["dtype"] == "bfloat16"
    json.dumps(workload.shapes())


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="--model=huge is unknown; choose one of roberta_base"):
        make_workload("huge", batch_size=1, sequence_length=1, dtype="float32")
    with pytest.raises(ValueError, match="--num_layers must be at least 1, got 0"):
        make_workload("tiny", batch_size=1, sequence_length=1, dtype="float32", num_layers=0)
    with pytest.raises(ValueError, match="3: none divides the batch of 4"):
        profile_programs.microbatch_sizes(4, [3])


def test_matrix_flops_count_loops_and_skip_dead_code() -> None:
    square = jnp.ones((4, 4))  # one product: 2 * 4^3 = 128 operations

    def program(x: jax.Array, trips: jax.Array) -> jax.Array:
        _ = x @ x  # not used
        x, _ = jax.lax.scan(lambda carry, _: (carry @ carry, None), x, length=3)
        x = jax.lax.cond(trips > 0, lambda x: x @ x @ x, lambda x: x, x)
        return jax.jit(jax.lax.fori_loop, static_argnums=2)(0, trips, lambda _, x: x @ x, x)

    jaxpr = jax.make_jaxpr(program)(square, 5)
    assert matrix_flops.matrix_flops(jaxpr, while_trips=5) == 128 * (3 + 2 + 5)


def test_rounds_take_turns() -> None:
    order: list[str] = []
    seconds = rounds.alternate({name: functools.partial(order.append, name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("module", [matrix_flops, profile_programs, rounds])
def test_examples_in_docstrings(module: Any) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed


@pytest.mark.oracle
@pytest.mark.slow  # a process that imports torch, transformers and Opacus
@pytest.mark.parametrize("model", ["tiny", "tiny_bert"])
def test_torch_peers(model: str) -> None:
    try:
        peers.require(peers.OPACUS)
    except peers.NotInstalledError as error:
        pytest.skip(f"Opacus is {error}")
    measured = profile_torch.measure_torch(
        model,
        batch_size=3,
        sequence_length=8,
        dtype="float32",
        num_layers=1,
        repeats=2,
        l2_clip_norm=0.1,
        progress=lambda line: None,
    )
    assert measured["reason"] is None
    assert list(measured["arms"]) == ["plain", "opacus_ghost"]
    assert measured["arms"]["plain"]["time_ratio"] == 1
    assert len(measured["arms"]["opacus_ghost"]["seconds_of_rounds"]) == 2
    assert measured["arms"]["opacus_ghost"]["relative_error"] < 1e-3
