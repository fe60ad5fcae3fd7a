"""A resumed run equals an uninterrupted one bit for bit: parameters, optimizer, noise, and the lines of its metrics."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dp_rmt.clipping.execution import Execution
from dp_rmt.data import fingerprint
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training import train
from dp_rmt.training.checkpoint import Checkpoints
from dp_rmt.training.evaluation import make_evaluator
from dp_rmt.training.losses import label_losses
from dp_rmt.training.metrics import MetricsWriter, read_metrics
from dp_rmt.training.partitioning import data_mesh, jit_train_step, place
from dp_rmt.training.preemption import EXIT_CODE, Preempted, Preemption
from dp_rmt.training.train import TrainLoop
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.training.train_step import make_train_step
from dp_rmt.trees import split_params

NUM_EXAMPLES, LENGTH, WORDS, WIDTH = 40, 6, 10, 12
MECHANISM = DPSGD(
    num_examples=NUM_EXAMPLES,
    expected_batch_size=8.0,
    num_steps=9,
    noise_multiplier=0.7,
    l2_clip_norm=0.5,
    max_batch_size=20,
    batch_multiple_of=4,
    accountant="rdp",
)
SAMPLING_SEED = 2**90 + 3


def make_arrays():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH + 1, NUM_EXAMPLES)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1, WORDS, (NUM_EXAMPLES, LENGTH)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "label": (ids.sum(axis=1) % 2).astype(np.int32)}


def logits(params, batch):
    hidden = jnp.sum(params["embedding"][batch["input_ids"]] * batch["attention_mask"][..., None], axis=1)
    return jnp.tanh(hidden @ params["hidden"]["kernel"]) @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.fixture(scope="module")
def training():
    """What every run shares; compiled once. The denoiser and Adam keep state of their own."""
    arrays, mesh = make_arrays(), data_mesh(jax.devices()[:1])
    schedule = optax.linear_schedule(0.1, 0.0, MECHANISM.num_steps)
    noise, denoise = MECHANISM.noise(noise_key(11)), MECHANISM.denoiser(below_edge="keep")
    transforms = Transforms(noise, denoise, optax.adamw(schedule))
    rng = np.random.default_rng(1)
    initial = {
        "embedding": rng.standard_normal((WORDS, WIDTH), np.float32) / 3,
        "hidden": {"kernel": rng.standard_normal((WIDTH, 16), np.float32) / 3},
        "out": {"kernel": rng.standard_normal((16, 2), np.float32) / 3, "bias": np.zeros(2, np.float32)},
    }
    params, frozen = split_params(initial, "hidden|out")
    execution = Execution("vmap", microbatch_size=4)
    losses = lambda p, b: label_losses(logits(p, b), b["label"])  # noqa: E731
    train_step = make_train_step(MECHANISM, losses, transforms, execution=execution)
    loop = TrainLoop(
        train_step=jit_train_step(train_step, mesh),
        mechanism=MECHANISM,
        delta=1e-3,
        arrays=arrays,
        lengths=(3, LENGTH),
        evaluators={"dev": make_evaluator(logits, arrays, metrics=("accuracy",), lengths=(LENGTH,), batch_size=16)},
        learning_rate=schedule,
        eval_every=3,
        checkpoint_every=2,
        published_params=transforms.published_params,
        microbatch_size=4,
    )

    def fresh_state(seed=11):
        noise = dataclasses.replace(transforms, noise=MECHANISM.noise(noise_key(seed)))
        return place(jax.tree.map(np.array, TrainState.create(noise, params, frozen)), mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EPSILON_POINTS", 3)  # accounting would take most of the time of these tests
        yield SimpleNamespace(loop=loop, fresh_state=fresh_state, identity={"train_data": fingerprint(arrays)})


def run(training, folder, *, until=None, seeds=(11, SAMPLING_SEED), **changes):
    """One process's worth: new objects, restored from the folder if there is a checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", training.identity)
    state, sampling_seed = training.fresh_state(seeds[0]), seeds[1]
    restored = checkpoints.restore(state)
    if restored is not None:
        state, sampling_seed = restored
    first_step = int(state.step)
    loop, metrics = dataclasses.replace(training.loop, **changes), MetricsWriter(folder / "metrics.jsonl")
    state = loop.run(state, MECHANISM.sampling(sampling_seed), checkpoints, metrics, None, until=until)
    state = jax.device_get(state)
    checkpoints.close()
    return state, first_step


def lines(folder):
    """The metrics without the seconds, which no two runs share."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    state, _ = run(training, folder)
    return state, lines(folder)


def assert_same_state(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_uninterrupted_run_does_what_it_should(training, uninterrupted):
    state, metrics = uninterrupted
    assert int(state.step) == int(state.noise.step) == MECHANISM.num_steps
    evaluated = [line["step"] for line in metrics if "eval/dev/accuracy" in line]
    trained = [line["step"] for line in metrics if "learning_rate" in line]
    assert evaluated == [0, 3, 6, 9]
    assert trained == list(range(1, 10))
    assert all({"nonprivate/loss", "denoise/kept_rank"} <= line.keys() for line in metrics if "learning_rate" in line)
    epsilons = {line["step"]: line["epsilon"] for line in metrics if "epsilon" in line}
    assert epsilons == {step: MECHANISM.epsilon(step, 1e-3) for step in (3, 6, 9)}
    before = jax.device_get(training.fresh_state())
    assert_same_state(state.frozen, before.frozen)
    assert not np.array_equal(state.params["hidden"]["kernel"], before.params["hidden"]["kernel"])


@pytest.mark.parametrize("stops", [(6,), (3, 6)])
def test_resumed_equals_uninterrupted(training, uninterrupted, tmp_path, stops):
    """Stopped where it would be evaluated anyway. Other seeds on resuming: those of the checkpoint count."""
    for stop in stops:
        state, _ = run(training, tmp_path, until=stop)
        assert int(state.step) == stop
    state, first_step = run(training, tmp_path, seeds=(99, 98))
    assert first_step == stops[-1]
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


def test_killed_between_checkpoints(training, uninterrupted, tmp_path):
    """Checkpoints every two steps and at the stop; the newest is lost, and lines of later steps are there already."""
    run(training, tmp_path, until=7)
    shutil.rmtree(tmp_path / "checkpoints" / "7")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "unfinished": ')
    state, first_step = run(training, tmp_path)
    assert first_step == 6
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


def test_killed_before_the_first_checkpoint(training, uninterrupted, tmp_path):
    """It starts over, with the seeds it was given."""
    run(training, tmp_path, until=1)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    state, first_step = run(training, tmp_path)
    assert first_step == 0
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("at", [0, 4, 8])
def test_stopped_by_sigterm(training, uninterrupted, tmp_path, caplog, at):
    """The step under way is finished and saved, whatever its number; the program would end with status 143."""
    steps = iter(range(MECHANISM.num_steps))

    def train_step(state, groups):
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return training.loop.train_step(state, groups)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped:
        run(training, tmp_path, train_step=train_step)
    assert signal.getsignal(signal.SIGTERM) == before
    assert isinstance(stopped.value, SystemExit)
    assert stopped.value.code == EXIT_CODE == 143
    assert f"stopped by SIGTERM after step {at + 1} of 9" in caplog.text
    state, first_step = run(training, tmp_path)
    assert first_step == at + 1
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that runs on an error may be reached."""


def test_killed_in_the_last_evaluation_before_any_checkpoint(training, uninterrupted, tmp_path):
    """A scheduler waits for seconds and an evaluation takes minutes: what was trained is saved before it begins."""

    def evaluate(params):
        if counted.pop() == MECHANISM.num_steps:
            deadline = time.monotonic() + 30
            while not (tmp_path / "checkpoints" / "9").is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)  # a save in the background, which a real death would end
            raise KilledError
        return training.loop.evaluators["dev"](params)

    counted = [9, 6, 3, 0]
    with pytest.raises(KilledError):
        run(training, tmp_path, evaluators={"dev": evaluate}, checkpoint_every=100)
    assert [line["step"] for line in lines(tmp_path) if "eval/dev/loss" in line] == [0, 3, 6]
    state, first_step = run(training, tmp_path, checkpoint_every=100)
    assert first_step == 9
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


def test_sigterm_in_the_last_evaluation_ends_the_program(training, uninterrupted, tmp_path, caplog):
    """What follows a run, such as writing texts, would take the scheduler's patience."""

    def evaluate(params):
        if counted.pop() == MECHANISM.num_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return training.loop.evaluators["dev"](params)

    counted = [9, 6, 3, 0]
    with pytest.raises(Preempted):
        run(training, tmp_path, evaluators={"dev": evaluate})
    assert "stopped by SIGTERM after step 9 of 9, which is saved" in caplog.text
    assert lines(tmp_path) == uninterrupted[1]
    state, first_step = run(training, tmp_path)
    assert first_step == 9
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


def test_sigterm_is_noticed_within_the_block_alone():
    with Preemption() as preemption:
        assert not preemption.came(0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.came(1)
    with Preemption() as preemption:
        assert not preemption.came(0)


@pytest.fixture
def listening_to_ctrl_c():
    """A process that a script starts in the background ignores SIGINT from its first moment on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening_to_ctrl_c")
def test_stopped_by_ctrl_c(training, uninterrupted, tmp_path, caplog, capfd):
    """As by SIGTERM, with a line at once and the status of a program that Ctrl-C ends."""
    steps = iter(range(MECHANISM.num_steps))

    def train_step(state, groups):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return training.loop.train_step(state, groups)

    with pytest.raises(Preempted) as stopped:
        run(training, tmp_path, train_step=train_step)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopped by Ctrl-C after step 5 of 9, which is saved; run the same command again" in caplog.text
    assert capfd.readouterr().err.count("press Ctrl-C again to end at once") == 1
    state, first_step = run(training, tmp_path)
    assert first_step == 5
    assert_same_state(state, uninterrupted[0])


TWICE = """
import hashlib, os, signal, threading
from dp_rmt.training.preemption import Preemption
for seconds in (0.2, 0.7):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
with Preemption():
    hashlib.pbkdf2_hmac("sha512", b"", b"", 200_000_000)  # minutes without a line of Python, as when XLA compiles
"""


def test_ctrl_c_twice_ends_at_once():
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 130
    assert ended.stderr.count("press Ctrl-C again to end at once") == 1
    assert time.monotonic() - begun < 60


def test_a_batch_is_filled_up_to_whole_microbatches(training):
    """As on another number of devices, whose microbatches are larger: samples and truncation stay what they were."""
    wider = dataclasses.replace(training.loop, microbatch_size=8)
    indices = MECHANISM.sampling(0).indices(0)
    groups = wider.groups(indices)
    assert {len(is_padding) for _, is_padding in groups} == {24}
    assert sum((~is_padding).sum() for _, is_padding in groups) == (indices >= 0).sum()


def test_a_metrics_file_that_cannot_be_written_says_how_to_go_on(training, tmp_path, monkeypatch):
    def full(self, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsWriter, "append", full)
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written: .* run the same command again"):
        run(training, tmp_path)


def test_checkpoints_at_uneven_steps_change_nothing(training, uninterrupted, tmp_path):
    """Every fourth step, then every one, stopped at five: only the evaluation at the stop is in addition."""
    run(training, tmp_path, until=5, checkpoint_every=4)
    state, first_step = run(training, tmp_path, checkpoint_every=1)
    assert first_step == 5
    assert_same_state(state, uninterrupted[0])
    in_addition = [line for line in lines(tmp_path) if line not in uninterrupted[1]]
    assert [(line["step"], "eval/dev/loss" in line) for line in in_addition] == [(5, True)]
    assert [line for line in lines(tmp_path) if line not in in_addition] == uninterrupted[1]


def test_a_finished_run_is_left_as_it_is(training, uninterrupted, tmp_path):
    run(training, tmp_path)
    state, first_step = run(training, tmp_path)
    assert first_step == MECHANISM.num_steps
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]


def test_until_zero_takes_no_step(training, tmp_path):
    state, _ = run(training, tmp_path, until=0)
    assert int(state.step) == 0


def test_killed_before_the_first_checkpoint_it_begins_again_with_its_own_seeds(training, uninterrupted, tmp_path):
    """Whatever seeds the second process draws: with those the data would be spent twice."""
    compiled = training.loop.train_step

    def dies(state, groups):
        if int(state.step) == 1:
            raise KeyboardInterrupt
        return compiled(state, groups)

    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path, train_step=dies)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["start.json"]
    state, first_step = run(training, tmp_path, seeds=(12, SAMPLING_SEED + 1))
    assert first_step == 0
    assert_same_state(state, uninterrupted[0])
    assert lines(tmp_path) == uninterrupted[1]
    assert not (tmp_path / "checkpoints" / "start.json").exists()


@pytest.mark.parametrize("seeds", [(12, SAMPLING_SEED), (11, SAMPLING_SEED + 1)])
def test_noise_and_batches_depend_on_their_seeds(training, uninterrupted, tmp_path, seeds):
    """Or the equalities above would say little."""
    state, _ = run(training, tmp_path, seeds=seeds)
    assert (state.params["hidden"]["kernel"] != uninterrupted[0].params["hidden"]["kernel"]).all()


def test_resuming_on_other_data_is_refused(training, tmp_path):
    run(training, tmp_path, until=1)
    other = SimpleNamespace(**{**vars(training), "identity": {"train_data": "another fingerprint"}})
    with pytest.raises(ValueError, match=r"train_data: checkpoint '\w{64}', now 'another fingerprint'"):
        run(other, tmp_path)
