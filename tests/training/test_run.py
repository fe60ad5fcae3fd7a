"""A run in its folder: what it writes, how it goes on, and what it refuses to go on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from mlp_run import *  # noqa: F403  (its fixtures)
from mlp_run import (
    DELTA,
    FILES,
    MECHANISM,
    NUM_EXAMPLES,
    SEEDS,
    assert_same,
    lines,
    make_task,
    plain_losses,
    prepare,
    with_sgd,
)

from dp_rmt import DPSGD
from dp_rmt.clipping.execution import Execution
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import Run, Seeds
from dp_rmt.training.ledger import only_writer, read_ledger
from dp_rmt.trees import leaves_by_path


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
