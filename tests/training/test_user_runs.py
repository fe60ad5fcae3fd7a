"""Runs whose unit of privacy is a user: what they count, what they say, and what they are where users have one row."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from dp_rmt.clipping.execution import Execution
from dp_rmt.clipping.quantile import QuantileClipping
from dp_rmt.data import gather_batch
from dp_rmt.data.length_groups import rows_of_groups
from dp_rmt.mechanism import DPSGD
from dp_rmt.noise_addition import noise_key
from dp_rmt.training.prepare import Seeds, prepare_run
from dp_rmt.training.task import Task
from dp_rmt.training.train_state import Transforms

ROWS = 120
X = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)
USERS = np.arange(ROWS) % 40  # forty users with three rows each
MECHANISM = DPSGD(
    num_examples=40,
    expected_batch_size=10.0,
    num_steps=3,
    noise_multiplier=1.5,
    l2_clip_norm=1.0,
    rows_per_user=2,
)


def losses(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


def transforms(mechanism, noise_seed, mesh):
    return Transforms(mechanism.noise(noise_key(noise_seed)), optax.identity(), optax.sgd(0.1))


def task(**changes):
    return Task(
        **({"train": {"x": X, "y": X.sum(1)}, "losses": losses, "params": {"w": np.zeros(4, np.float32)}} | changes)
    )


def run(of_task, mechanism, **options):
    options = {"delta": 1e-4, "seeds": Seeds(1, 2), "execution": Execution("vmap", 2)} | options
    return prepare_run(of_task, mechanism, transforms, **options)


@pytest.mark.parametrize("rows_per_user", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_with_one_row_a_user_a_run_is_bit_for_bit_that_of_examples(rows_per_user, tmp_path):
    by_example = dataclasses.replace(MECHANISM, num_examples=ROWS, rows_per_user=None, expected_batch_size=30.0)
    by_user = dataclasses.replace(by_example, rows_per_user=rows_per_user)
    ids = [f"person {i}" for i in np.random.default_rng(1).permutation(ROWS)]
    expected = run(task(), by_example).train(tmp_path / "examples")
    state = run(task(users=ids), by_user).train(tmp_path / "users")
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("examples", "users")]
    for first, second in zip(*lines, strict=True):
        first, second = json.loads(first), json.loads(second)
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert (tmp_path / "users" / "privacy.md").read_text().count("one person") >= 1


def test_numbers_delta_and_ledger_count_users(tmp_path):
    made = run(task(users=USERS), MECHANISM)
    made.train(tmp_path, until=2)
    statement = json.loads((tmp_path / "privacy.json").read_text())
    assert statement["unit_of_privacy"].startswith("one person")
    assert statement["rows_per_user"] == 2
    assert statement["num_examples"] == 40
    assert statement["sampling_probability"] == 0.25
    assert statement["epsilon"] == pytest.approx(MECHANISM.epsilon(2, 1e-4))
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert entries[-1]["unit"] == "user"
    assert entries[-1]["num_examples"] == 40
    sizes = [
        json.loads(line).get("nonprivate/batch_size") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(size for size in sizes if size is not None) <= 40
    text = (tmp_path / "privacy.md").read_text()
    assert "one person" in text
    assert "2 at random" in text
    assert "People with several examples" not in text
    # Of 40 users 1 / sqrt(N) is .158, of 120 rows it would be .091.
    with pytest.raises(ValueError, match="40 training users"):
        run(task(users=USERS), MECHANISM, delta=0.2)
    # The rows of two users are exchanged: other data, so that the same noise would cancel.
    other = USERS.copy()
    other[[0, 1]] = other[[1, 0]]
    with pytest.raises(ValueError, match="train_data"):
        run(task(users=other), MECHANISM).train(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_clip_norm_follows_the_norms_of_users(tmp_path):
    """Three rows of a user, two large and opposite: the norm that is followed is that of their mean, not of a row."""
    x = np.zeros((ROWS, 4), np.float32)
    x[:, 0] = np.repeat([100.0, -100.0, 3.0], 40)
    mechanism = dataclasses.replace(
        MECHANISM,
        expected_batch_size=40.0,
        num_steps=6,
        noise_multiplier=2.0,
        l2_clip_norm=2.0,
        rows_per_user=3,
        clip_quantile=QuantileClipping(share=0.2, learning_rate=1.0),
    )
    linear = task(train={"x": x}, losses=lambda params, batch: batch["x"] @ params["w"], users=USERS)
    run(linear, mechanism, nonprivate_metrics=False).train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = [line["clipping/l2_clip_norm"] for line in lines if "clipping/l2_clip_norm" in line]
    # Every user has a mean gradient of norm 1, around which the norm goes to and fro by exp(.5). Rows: up, to 100.
    assert norms[0] == 2.0
    assert all(0.4 < norm < 1.7 for norm in norms[1:])  # and the noise of a count is .06 of the sample
    page = (tmp_path / "privacy.md").read_text()
    assert "user's gradient, the mean over the rows taken, is clipped to a norm that begins at 2 and follows" in page
    entry = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert (entry["unit"], entry["noise_multiplier"]) == ("user", 2.0)


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="go together"):
        run(task(), MECHANISM)
    with pytest.raises(ValueError, match="go together"):
        run(task(users=USERS), dataclasses.replace(MECHANISM, num_examples=ROWS, rows_per_user=None))
    with pytest.raises(ValueError, match="40"):
        run(task(users=USERS), dataclasses.replace(MECHANISM, num_examples=ROWS))
    with pytest.raises(ValueError, match="one id for each row"):
        task(users=USERS[1:])


def test_length_groups_keep_the_rows_of_a_user_together():
    mask = (np.arange(8) < np.array([1, 8, 3, 2, 1, 8])[:, None]).astype(np.int32)
    arrays = {"attention_mask": mask, "row": np.arange(6)}
    indices = np.array([[0, 1], [2, 3], [4, -1], [-1, -1]], np.int32)
    groups = rows_of_groups(arrays, indices, lengths=(2, 4, 8), microbatch_size=1)
    kept = [members[(members >= 0).any(axis=1)].tolist() for _, members in groups]
    assert kept == [[[4, -1]], [[2, 3]], [[0, 1]]]  # -1 is not the last row, which is long
    assert sorted(gather_batch(*groups[0])[1].tolist()) == [[False, True], *[[True, True]] * 3]
    batch, is_padding = gather_batch(*groups[1])
    assert batch["attention_mask"].shape == (4, 2, 4)
    assert is_padding.shape == (4, 2)
    assert (batch["attention_mask"].sum(-1) > 0).all()  # no row, padding or not, is without a token
