"""A batch in groups of equal length: no example lost, doubled or cut, and the same sum of clipped gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dp_rmt.clipping.per_example import clipped_grad
from dp_rmt.data.length_groups import check_lengths, group_by_length, rows_by_length

NUM_ROWS, LENGTH, BATCH = 30, 8, 8
WORDS = 6


def make_arrays(mask, seed=0):
    """Tokens that tell rows apart, their mask, and a label; the mask may be of any form."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(1, WORDS, mask.shape).astype(np.int32) * (mask != 0),
        "attention_mask": mask.astype(np.int32),
        "row": np.arange(len(mask), dtype=np.int32),
        "two_numbers": rng.standard_normal((len(mask), 2)).astype(np.float32),
    }


MASKS = st.one_of(
    st.lists(st.integers(0, LENGTH), min_size=NUM_ROWS, max_size=NUM_ROWS).map(
        lambda lengths: np.arange(LENGTH) < np.array(lengths)[:, None]
    ),
    hnp.arrays(bool, (NUM_ROWS, LENGTH)),  # padding on the left, or in the middle
)
LENGTHS = st.sets(st.integers(1, LENGTH - 1), max_size=4).map(lambda inner: (*sorted(inner), LENGTH))
SAMPLES = st.sets(st.integers(0, NUM_ROWS - 1), max_size=BATCH).map(
    lambda rows: np.array([*sorted(rows), *[-1] * (BATCH - len(rows))], np.int32)
)


@settings(max_examples=200, deadline=None)
@given(MASKS, LENGTHS, SAMPLES, st.sampled_from([None, 1, 2, 4, 8]))
def test_every_example_is_in_one_group_whole(mask, lengths, indices, microbatch_size):
    arrays = make_arrays(mask)
    groups = group_by_length(arrays, indices, lengths=lengths, microbatch_size=microbatch_size)
    assert len(groups) == (1 if microbatch_size is None else len(lengths))
    found = []
    for (batch, is_padding), length in zip(groups, lengths if microbatch_size else (LENGTH,)):
        assert is_padding.shape == (BATCH,)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (BATCH, length)
        assert batch["two_numbers"].shape == (BATCH, 2)
        for slot in np.flatnonzero(~is_padding):
            row = batch["row"][slot]
            found.append(row)
            for name in ("input_ids", "attention_mask"):
                np.testing.assert_array_equal(batch[name][slot], arrays[name][row, :length])
                assert not arrays[name][row, length:].any()  # nothing was cut off
            np.testing.assert_array_equal(batch["two_numbers"][slot], arrays["two_numbers"][row])
    assert sorted(found) == indices[indices >= 0].tolist()


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.lists(st.integers(0, LENGTH), min_size=1, max_size=20))
def test_each_row_is_in_the_shortest_group_that_holds_it(lengths, tokens):
    mask = np.arange(LENGTH) < np.array(tokens)[:, None]
    for number, rows in enumerate(rows_by_length(mask, lengths)):
        shorter = lengths[number - 1] if number else -1
        assert rows.tolist() == [i for i, n in enumerate(tokens) if shorter < n <= lengths[number]]


def losses(params, batch):
    """Depends on the tokens in their order, and not on padding."""
    hidden = jnp.tanh(params["embedding"][batch["input_ids"]]) * batch["attention_mask"][..., None]
    order = jnp.arange(1, batch["input_ids"].shape[1] + 1)
    return jnp.einsum("btd,t->b", hidden, order) * batch["two_numbers"][:, 0] / LENGTH


@functools.cache
def compiled(microbatch_size):
    return jax.jit(clipped_grad(losses, l2_clip_norm=0.5, microbatch_size=microbatch_size))


PARAMS = {"embedding": jnp.asarray(np.random.default_rng(0).standard_normal((WORDS, 3)), jnp.float32)}


@settings(max_examples=40, deadline=None)
@given(MASKS, SAMPLES, st.sampled_from([1, 2]))
def test_the_sum_of_clipped_gradients_does_not_notice(mask, indices, microbatch_size):
    """Exact to the rounding of a sum of eight gradients of norm 1/2."""
    arrays = make_arrays(mask)
    ((batch, is_padding),) = group_by_length(arrays, indices, lengths=(LENGTH,), microbatch_size=None)
    expected, whole = compiled(None)(PARAMS, batch, is_padding_example=is_padding)
    groups = group_by_length(arrays, indices, lengths=(3, LENGTH), microbatch_size=microbatch_size)
    parts = [compiled(microbatch_size)(PARAMS, b, is_padding_example=p) for b, p in groups]
    total = sum(gradient["embedding"] for gradient, _ in parts)
    np.testing.assert_allclose(total, expected["embedding"], rtol=0, atol=2e-6)
    norms = np.concatenate([np.asarray(per_example.grad_norm) for _, per_example in parts])
    np.testing.assert_allclose(np.sort(norms)[-BATCH:], np.sort(whole.grad_norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [1, 2, 4])
def test_padding_fills_whole_microbatches_at_the_end(microbatch_size):
    """Five short and no long rows: as few microbatches as five rows need, and none for the long group."""
    arrays = make_arrays(np.arange(LENGTH) < np.full(NUM_ROWS, 3)[:, None])
    indices = np.array([0, 1, 2, 3, 4, -1, -1, -1])
    short, long = group_by_length(arrays, indices, lengths=(4, LENGTH), microbatch_size=microbatch_size)
    num_microbatches = BATCH // microbatch_size
    present = ~short[1].reshape(microbatch_size, num_microbatches)  # microbatch j holds the rows j, j + M, ...
    needed = -(-5 // microbatch_size)
    np.testing.assert_array_equal(present.any(axis=0), np.arange(num_microbatches) < needed)
    assert long[1].all()


def test_sampling_of_all_lengths_fits_one_group():
    """Every group has room for the whole batch: nothing is dropped, whatever the lengths are."""
    arrays = make_arrays(np.ones((NUM_ROWS, LENGTH), bool))
    groups = group_by_length(arrays, np.arange(BATCH), lengths=(2, LENGTH), microbatch_size=2)
    assert [int((~is_padding).sum()) for _, is_padding in groups] == [0, BATCH]


@pytest.mark.parametrize("lengths", [(), (4,), (4, 9), (5, 4, 8), (4, 4, 8), (0, 8), (-1, 8)])
def test_refuses_lengths_that_do_not_ascend_to_the_data(lengths):
    with pytest.raises(ValueError, match="must be positive, ascend and end at the length of the data, 8"):
        check_lengths(lengths, LENGTH)
    if not lengths:  # which says that a batch is not split
        return
    arrays = make_arrays(np.ones((NUM_ROWS, LENGTH), bool))
    with pytest.raises(ValueError, match="ascend"):
        group_by_length(arrays, np.arange(BATCH), lengths=lengths, microbatch_size=2)


@pytest.mark.parametrize("microbatch_size", [None, 2, 3])
def test_data_without_lengths_is_one_group_of_any_shape(microbatch_size):
    """Its padding still fills whole microbatches at the end, which are skipped."""
    arrays = {"pixels": np.arange(40).reshape(5, 2, 4)}
    indices = np.array([0, 3, 4, -1, -1, -1])
    ((batch, is_padding),) = group_by_length(arrays, indices, lengths=(), microbatch_size=microbatch_size)
    assert sorted(batch["pixels"][~is_padding][:, 0, 0]) == [0, 24, 32]
    if microbatch_size:
        microbatches = is_padding.reshape(microbatch_size, -1).T  # microbatch j holds the rows j, j + M, ...
        empty = microbatches.all(axis=1)
        assert empty.sum() == (6 - 3) // microbatch_size
        assert (np.sort(empty) == empty).all()
