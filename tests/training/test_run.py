"""The middle door: a model and data of one's own, with identity, seeds, ledger, statement, locks and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging as python_logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from dp_rmt import DPSGD
from dp_rmt.clipping.execution import Execution
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import About, Run, Seeds, Task, Transforms, prepare_run, train
from dp_rmt.training.ledger import only_writer, read_ledger
from dp_rmt.training.metrics import read_metrics
from dp_rmt.trees import leaves_by_path

NUM_EXAMPLES, FEATURES, DELTA = 60, 5, 1e-3
MECHANISM = DPSGD(
    num_examples=NUM_EXAMPLES,
    expected_batch_size=12.0,
    num_steps=6,
    noise_multiplier=4.0,
    l2_clip_norm=0.5,
    accountant="rdp",
)
EXECUTION = Execution("vmap", 4)
SEEDS = Seeds(sampling=2**100 + 5, noise=2**101 + 7)
FILES = {"checkpoints", "ledger.jsonl", "metrics.jsonl", "privacy.json", "privacy.md"}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="out")(nn.tanh(nn.Dense(16, name="in")(x)))


def flax_losses(params: Any, batch: Any) -> jax.Array:
    logits: Any = MLP().apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def plain_losses(params: Any, batch: Any) -> jax.Array:
    """The same model without Flax."""
    layers = params["params"]
    hidden = jnp.tanh(batch["x"] @ layers["in"]["kernel"] + layers["in"]["bias"])
    logits = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def make_task(losses: Any = flax_losses, *, seed: int = 0, **changes: Any) -> Task:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((NUM_EXAMPLES, FEATURES)).astype(np.float32)
    train = {"x": x, "label": (x.sum(axis=1) > 0).astype(np.int32)}
    params = jax.tree.map(np.asarray, MLP().init(jax.random.key(1), x[:1]))
    evaluators = {"dev": lambda p: {"loss": float(jnp.mean(losses(p, train)))}}
    return Task(train, losses, params, **{"evaluators": evaluators, **changes})


def make_transforms(mechanism: DPSGD, noise_seed: int, mesh: jax.sharding.Mesh) -> Transforms:
    noise = mechanism.noise(noise_key(noise_seed))
    return Transforms(noise, mechanism.denoiser(below_edge="keep"), optax.adam(0.05))


def prepare(task: Task | None = None, mechanism: DPSGD = MECHANISM, **options: Any) -> Run:
    """By vmap, which is compiled sooner than what is faster."""
    given = {"delta": DELTA, "seeds": SEEDS, "checkpoint_every": 2, "eval_every": 3, "execution": EXECUTION, **options}
    return prepare_run(task or make_task(), mechanism, given.pop("transforms", make_transforms), **given)


@pytest.fixture(autouse=True, scope="module")
def accounted_once() -> Iterator[None]:
    """Accounting, always of the same updates, would take most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EPSILON_POINTS", 2)
        for name in ("epsilon", "epsilon_by_accountant", "largest_true_positive_rate"):
            patch.setattr(DPSGD, name, functools.cache(getattr(DPSGD, name)))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run = prepare()
    return SimpleNamespace(run=run, workdir=workdir, state=jax.device_get(run.train(workdir)), lines=lines(workdir))


@pytest.fixture
def copy(finished: SimpleNamespace, tmp_path: Path) -> Path:
    return shutil.copytree(finished.workdir, tmp_path / "run")


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without the seconds, which no two runs share."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(workdir / "metrics.jsonl")]


def assert_same(state: Any, expected: Any) -> None:
    state = jax.device_get(state)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs on an error or at the end may be reached."""


def kill_at(run: Run, step: int, workdir: Path) -> Run:
    """The run, which dies when it is about to compute update step + 1.

    Saving goes on in a thread, which a real death would end; here it must come to its end before.
    """

    def train_step(state: Any, groups: Any) -> Any:
        if int(state.step) == step:
            while step >= 2 and not (workdir / "checkpoints" / "2").is_dir():
                time.sleep(0.01)
            raise Killed
        return run.loop.train_step(state, groups)

    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, train_step=train_step))


def test_a_run_trains_and_says_what_it_released(finished: SimpleNamespace) -> None:
    assert {path.name for path in finished.workdir.iterdir()} == FILES
    assert int(finished.state.step) == MECHANISM.num_steps
    losses = {line["step"]: line["eval/dev/loss"] for line in finished.lines if "eval/dev/loss" in line}
    assert list(losses) == [0, 3, 6]
    assert len({*losses.values()}) == 3
    record = json.loads((finished.workdir / "privacy.json").read_text())
    assert record["epsilon"] == MECHANISM.epsilon(6, DELTA)
    assert (record["num_steps"], record["is_upper_bound"], record["noise_std"]) == (6, False, MECHANISM.noise_std)
    assert record["evaluation_data"] == ["dev"]
    assert record["seeds_from"] == "given in the config"
    (*_, entry) = read_ledger(finished.workdir)
    assert (entry.updates, entry.is_exact, entry.num_examples) == (6, True, NUM_EXAMPLES)
    assert "nonprivate/loss" in finished.lines[1]
    assert "learning_rate" not in finished.lines[1]


def with_sgd(mechanism: DPSGD, noise_seed: int, mesh: Any) -> Transforms:
    return Transforms(mechanism.noise(noise_key(noise_seed)), optax.identity(), optax.sgd(0.1))


def test_the_update_is_the_mechanism_s() -> None:
    """The first one by hand: the sample, the clipped sum over B = 12, this run's noise, the learning rate."""
    run, task = prepare(transforms=with_sgd), make_task()
    indices = MECHANISM.sampling(run.sampling_seed).indices(0)
    batch = {name: values[indices[indices >= 0]] for name, values in task.train.items()}
    gradients = jax.vmap(jax.grad(lambda p, x, y: plain_losses(p, {"x": x[None], "label": y[None]})[0]), (None, 0, 0))(
        task.params, batch["x"], batch["label"]
    )
    norms = np.sqrt(sum(np.sum(np.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)))
    factors = np.minimum(1, 0.5 / norms) / 12
    clipped = jax.tree.map(lambda g: np.einsum("b,b...->...", factors, g), gradients)
    noise = MECHANISM.noise(noise_key(SEEDS.noise or 0))
    noisy, _ = noise.update(clipped, noise.init(task.params))
    state, _ = run.loop.train_step(run.state, run.loop.groups(indices))
    for path, leaf in leaves_by_path(state.params):
        expected = dict(leaves_by_path(task.params))[path] - 0.1 * dict(leaves_by_path(noisy))[path]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stops", [(4,), (1, 2, 5)])
def test_a_stopped_run_goes_on_bit_for_bit(finished: SimpleNamespace, tmp_path: Path, stops: tuple[int, ...]) -> None:
    for stop in stops:
        state = finished.run.train(tmp_path, until=stop)
        assert int(state.step) == stop
    assert_same(finished.run.train(tmp_path), finished.state)
    expected = [line for line in finished.lines if "nonprivate/loss" in line]
    assert [line for line in lines(tmp_path) if "nonprivate/loss" in line] == expected
    assert len({entry.run for entry in read_ledger(tmp_path)}) == 1


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_run_goes_on_bit_for_bit(finished: SimpleNamespace, tmp_path: Path, at: int) -> None:
    """Before its first checkpoint, and after one; what was announced bounds what it did.

    Whatever seeds the next process draws: with those the data would be spent twice.
    """
    with pytest.raises(Killed):
        kill_at(finished.run, at, tmp_path).train(tmp_path)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert record["is_upper_bound"]
    assert at <= record["num_steps"]
    assert_same(prepare(seeds=Seeds()).train(tmp_path), finished.state)
    assert lines(tmp_path) == finished.lines
    assert json.loads((tmp_path / "privacy.json").read_text())["num_steps"] == 6


def test_one_run_object_trains_in_parts_and_again(finished: SimpleNamespace, tmp_path: Path) -> None:
    """As in a notebook, though training gives the arrays of its state away."""
    run = finished.run
    run.train(tmp_path / "run", until=2)
    assert_same(run.train(tmp_path / "run"), finished.state)
    assert_same(run.trained_state(tmp_path / "run"), finished.state)
    assert_same(run.train(tmp_path / "again", until=0), jax.device_get(run.fresh_state()))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: train the run first"):
        run.trained_state(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"task": make_task(seed=1)}, "train_data: checkpoint"),
    "clip norm": ({"l2_clip_norm": 0.6}, "l2_clip_norm: checkpoint '0.5', now '0.6'"),
    "noise": ({"noise_multiplier": 3.9}, "noise_multiplier: checkpoint '4.0', now '3.9'"),
    "sampling": ({"expected_batch_size": 11}, "expected_batch_size: checkpoint '12.0', now '11.0'"),
    "steps": ({"num_steps": 7}, "num_steps: checkpoint '6', now '7'"),
    "delta": ({"delta": 1e-4}, "delta: checkpoint '0.001', now '0.0001'"),
    "method": ({"execution": Execution("bookkeeping", 4)}, "clipping_method: checkpoint 'vmap', now 'bookkeeping'"),
    "microbatches": ({"execution": Execution("vmap", 2)}, "microbatch_size: checkpoint '4', now '2'"),
    "learning rate": ({"identity": {"rate": 0.1}}, "rate: checkpoint None, now '0.1'"),
}


@pytest.mark.parametrize("what", list(OTHER))
def test_another_run_is_refused_and_nothing_is_written(what: str, copy: Path) -> None:
    options, message = OTHER[what]
    numbers = {name: options[name] for name in options.keys() & {field.name for field in dataclasses.fields(DPSGD)}}
    given = {name: value for name, value in options.items() if name not in numbers}
    other = prepare(
        mechanism=dataclasses.replace(MECHANISM, max_batch_size=None, **numbers), transforms=with_sgd, **given
    )
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for refuses in (other.check, other.train):
        with pytest.raises(ValueError, match=f"(?s)belongs to another experiment:\n.*{message}"):
            refuses(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}.items() <= before.items()


def test_a_second_run_on_the_data_is_refused(copy: Path, finished: SimpleNamespace) -> None:
    """The ledger remembers what was spent when the checkpoints are gone; without it, the results do."""
    shutil.rmtree(copy / "checkpoints")
    for refuses in (finished.run.check, finished.run.train):
        with pytest.raises(FileExistsError, match=r"says that 6 updates on 60 .*its checkpoints are gone"):
            refuses(copy)
    shutil.rmtree(copy / "checkpoints", ignore_errors=True)
    (copy / "ledger.jsonl").unlink()
    with pytest.raises(FileExistsError, match=r"results of a run \(privacy.json, of 6 .*The seeds were given"):
        finished.run.check(copy)


def test_a_finished_run_is_left_as_it_is(copy: Path, finished: SimpleNamespace) -> None:
    before = {name: (copy / name).read_bytes() for name in ("metrics.jsonl", "ledger.jsonl", "privacy.json")}
    finished.run.check(copy)
    assert_same(finished.run.train(copy), finished.state)
    assert before == {name: (copy / name).read_bytes() for name in before}


def test_only_one_process_trains_in_a_folder(finished: SimpleNamespace, tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another process trains in"):
        finished.run.train(tmp_path)


def test_seeds_are_drawn_for_each_run_unless_given(tmp_path: Path) -> None:
    runs = [prepare(seeds=Seeds()) for _ in range(2)]
    assert len({run.sampling_seed for run in runs}) == 2
    assert not np.array_equal(runs[0].state.noise.key, runs[1].state.noise.key)
    runs[0].train(tmp_path, until=1)
    assert json.loads((tmp_path / "privacy.json").read_text())["seeds_from"] == "os entropy"
    assert prepare(seeds=Seeds(noise=3)).guarantee.seeds_given


def test_nothing_has_to_be_said_of_the_execution(finished: SimpleNamespace, tmp_path: Path) -> None:
    """By default Flax layers are clipped by their rules, and other losses by vmap: the same but for rounding."""
    for losses in (flax_losses, plain_losses):
        run = prepare(make_task(losses), execution=Execution())
        assert (run.identity["clipping_method"], run.identity["microbatch_size"]) == ("auto", "auto")
        run.train(tmp_path / losses.__name__, until=2)
        found, expected = (
            [
                [line[f"nonprivate/{name}"] for line in of if "nonprivate/loss" in line][:2]
                for name in ("loss", "grad_norm")
            ]
            for of in (lines(tmp_path / losses.__name__), finished.lines)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)  # Adam divides by what may be small


def test_losses_without_flax_are_clipped_by_vmap(finished: SimpleNamespace, tmp_path: Path) -> None:
    state = prepare(make_task(plain_losses), execution=EXECUTION).train(tmp_path)
    for leaf, same in zip(*map(jax.tree.leaves, (state.params, finished.state.params)), strict=True):
        np.testing.assert_allclose(leaf, same, rtol=0, atol=1e-4)  # of up to 6 steps of 0.05


def test_what_is_frozen_stays_and_what_is_published_is_whole(tmp_path: Path) -> None:
    task = make_task(trainable="out")
    run = prepare(task)
    seen = []
    state = run.train(tmp_path, until=2, write_results=lambda *given: seen.append(given))
    assert list(state.params["params"]) == ["out"]
    published = run.published_params(state)
    np.testing.assert_array_equal(published["params"]["in"]["kernel"], task.params["params"]["in"]["kernel"])
    ((step, params, metrics),) = seen
    assert (step, metrics.path) == (2, tmp_path / "metrics.jsonl")
    jax.tree.map(np.testing.assert_array_equal, params, published)


def test_the_microbatch_size_is_found_by_compiling_or_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two of at most a quarter of the expected batch of 12."""
    devices = jax.device_count()
    found = prepare(execution=Execution("vmap"))
    assert found.loop.microbatch_size == max(1, 1 << (12 // (4 * devices)).bit_length() - 1) * devices
    assert prepare(execution=Execution("vmap", 5)).loop.microbatch_size == -(-5 // devices) * devices
    monkeypatch.setattr("dp_rmt.training.microbatches.default_memory_budget", lambda: 1000)
    with pytest.raises(ValueError, match="one example at a time needs"):
        prepare(execution=Execution("vmap"))


def test_a_run_tells_of_its_model(tmp_path: Path) -> None:
    about = About(base_model="folder/mlp", task="signs", tuning="full", target_epsilon=9.0, texts_of="test")
    prepare(about=about, nonprivate_metrics=False, learning_rate=lambda step: 0.05).train(tmp_path, until=1)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (record["about"]["base_model"], record["about"]["task"], record["about"]["tuning"]) == (
        "folder/mlp",
        "signs",
        "full",
    )
    assert (record["target_epsilon"], record["evaluation_data"], record["texts_of"]) == (9.0, ["dev", "test"], "test")
    assert record["nonprivate_metrics"] is False
    line = lines(tmp_path)[1]
    assert line["learning_rate"] == 0.05
    assert not any(name.startswith("nonprivate/") for name in line)


def no_noise(mechanism: DPSGD, noise_seed: int, mesh: Any) -> Transforms:
    return Transforms(optax.identity(), optax.identity(), optax.sgd(0.1))


def own_noise(mechanism: DPSGD, noise_seed: int, mesh: Any) -> Transforms:
    return Transforms(mechanism.noise(noise_key(1)), optax.identity(), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mechanism": dataclasses.replace(MECHANISM, num_examples=70)},
            "accounts for 70 examples and the task has 60",
        ),
        ({"delta": 0.2}, r"delta=0.2 is above 1 / sqrt\(N\) = 0.129 of the 60"),
        ({"delta": 0.0}, "delta must be above 0 and below 1"),
        ({"transforms": no_noise}, "noise is not that of the run's seed: let the function return Transforms"),
        ({"transforms": own_noise}, "noise is not that of the run's seed"),
        ({"seeds": Seeds(noise=2**128)}, r"must be in \[0, 2\^128\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(**options)


def test_fast_clipping_of_losses_that_it_does_not_know_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"clipping_method='ghost' does not fit this model: .*give clipping_method='v"):
        prepare(make_task(plain_losses), execution=Execution("ghost", None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"x": np.ones((3, 2)), "y": np.ones(4)}}, "the first axis of each must be the examples"),
        ({"train": {}}, "the first axis of each must be the examples"),
        ({"train": {"x": np.ones(())}}, "the first axis of each must be the examples"),
        ({"lengths": (4,)}, "whose train data has an 'attention_mask'"),
        ({"params": {"w": [np.ones(2), np.ones(2)]}}, "params must be nested dicts"),
        ({"params": np.ones(2)}, "params must be nested dicts"),
    ],
)
def test_a_task_refuses_what_is_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_task(), **changes)


@contextlib.contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []
    logging.get_absl_logger().addHandler(caplog.handler)
    with caplog.at_level(python_logging.WARNING):
        yield found
    logging.get_absl_logger().removeHandler(caplog.handler)
    found += {record.getMessage() for record in caplog.records}


def test_a_denoiser_without_matrices_and_a_large_delta_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as found:
        prepare(make_task(trainable="bias"), delta=0.02)
    assert any("has no matrix among what is trained" in message for message in found)
    assert any("delta=0.02 is at least 1 / N = 0.0167 of the 60 training examples" in message for message in found)
    caplog.clear()
    with warnings_of(caplog) as found:
        prepare()
    assert not found


def test_without_noise_nothing_is_promised(tmp_path: Path) -> None:
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=0.0, l2_clip_norm=float("inf"))
    prepare(mechanism=mechanism, transforms=with_sgd).train(tmp_path, until=1)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (record["is_private"], record["epsilon"], record["l2_clip_norm"]) == (False, None, None)
