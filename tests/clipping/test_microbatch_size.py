"""The microbatch size from what the compiler says, on a real clipped gradient and on made-up numbers."""

from __future__ import annotations

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dp_rmt.clipping.microbatch_size import (
    DEVICE_SHARE,
    HOST_SHARE,
    bytes_needed,
    default_memory_budget,
    largest_microbatch_size,
)
from dp_rmt.clipping.per_example import clipped_grad

BATCH, FEATURES, HIDDEN = 12, 16, 64
EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes")


def compile_clipped_gradient(size):
    """The per-example gradients of a microbatch are its temporaries: 4 * FEATURES * HIDDEN bytes each, and more."""

    def losses(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T), axis=1)

    gradient = clipped_grad(losses, l2_clip_norm=1.0, microbatch_size=size)
    arguments = jnp.ones((FEATURES, HIDDEN)), jnp.ones((BATCH, FEATURES))
    return jax.jit(gradient).lower(*arguments, is_padding_example=None).compile()


@pytest.fixture(scope="module")
def sizes():
    """Bytes by microbatch size, of the sizes that a batch of 12 is tried with."""
    return {size: bytes_needed(compile_clipped_gradient(size)) for size in (12, 6, 3, 1)}


def made_up(bytes_at, *, argument=0, output=0, alias=0, code=0):
    """A compiler of programs whose temporaries are a function of the size; it remembers what it was asked."""
    asked = []

    def compile_step(size):
        asked.append(size)
        temporaries = bytes_at(size)
        if isinstance(temporaries, Exception):
            raise temporaries
        memory = SimpleNamespace(
            temp_size_in_bytes=temporaries,
            argument_size_in_bytes=argument,
            output_size_in_bytes=output,
            alias_size_in_bytes=alias,
            generated_code_size_in_bytes=code,
        )
        return SimpleNamespace(memory_analysis=lambda: memory)

    return compile_step, asked


def test_memory_of_a_clipped_gradient_grows_with_the_microbatch(sizes):
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sizes[12] - sizes[6] >= 6 * 4 * FEATURES * HIDDEN


@pytest.mark.parametrize("size", [12, 6, 3, 1])
def test_a_clipped_gradient_gets_the_largest_size_that_fits(size, sizes):
    assert largest_microbatch_size(compile_clipped_gradient, batch_size=BATCH, memory_budget=sizes[size]) == size
    if size > 1:
        smaller = largest_microbatch_size(compile_clipped_gradient, batch_size=BATCH, memory_budget=sizes[size] - 1)
        assert smaller == {12: 6, 6: 3, 3: 1}[size]


def test_nothing_fits(sizes):
    with pytest.raises(ValueError, match=rf"needs {sizes[1]:,} bytes.*budget is {sizes[1] - 1:,} bytes"):
        largest_microbatch_size(compile_clipped_gradient, batch_size=BATCH, memory_budget=sizes[1] - 1)


@pytest.mark.parametrize(
    ("batch_size", "tried"),
    [
        (1, [1]),
        (7, [7, 1]),
        (12, [12, 6, 3, 1]),
        (40, [40, 20, 10, 5, 2, 1]),
        (45, [45, 15, 5, 1]),
        (64, [64, 32, 16, 8, 4, 2, 1]),
    ],
)
def test_sizes_divide_the_batch_and_halve(batch_size, tried):
    compile_step, asked = made_up(lambda size: size)
    assert largest_microbatch_size(compile_step, batch_size=batch_size, memory_budget=1) == 1
    assert asked == tried


def test_all_at_once_is_one_compilation():
    compile_step, asked = made_up(lambda size: 10 * size)
    assert largest_microbatch_size(compile_step, batch_size=64, memory_budget=640) == 64
    assert asked == [64]


def test_what_counts():
    """Arguments, results, temporaries and code; donated arguments that become results once."""
    compile_step, _ = made_up(lambda size: size, argument=100, output=50, alias=30, code=7)
    assert bytes_needed(compile_step(8)) == 135
    assert largest_microbatch_size(compile_step, batch_size=8, memory_budget=135) == 8
    assert largest_microbatch_size(compile_step, batch_size=8, memory_budget=134) == 4


def test_donated_arguments_count_once():
    x = jnp.ones(1000, jnp.float32)
    kept, donated = (
        bytes_needed(jax.jit(lambda a: a + 1, donate_argnums=numbers).lower(x).compile()) for numbers in ((), (0,))
    )
    assert kept - donated == x.nbytes


def test_a_compiler_that_runs_out_of_memory_means_too_large():
    compile_step, asked = made_up(lambda size: EXHAUSTED if size > 4 else size)
    assert largest_microbatch_size(compile_step, batch_size=16, memory_budget=100) == 4
    assert asked == [16, 8, 4]
    compile_step, _ = made_up(lambda size: EXHAUSTED)
    with pytest.raises(ValueError, match=r"needs more than there is.*budget is 100 bytes"):
        largest_microbatch_size(compile_step, batch_size=16, memory_budget=100)


def test_other_errors_are_not_swallowed():
    compile_step, asked = made_up(lambda size: jax.errors.JaxRuntimeError("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        largest_microbatch_size(compile_step, batch_size=16, memory_budget=100)
    assert asked == [16]


def test_a_backend_that_does_not_tell():
    def compile_step(size):
        return SimpleNamespace(memory_analysis=lambda: None)

    with pytest.raises(ValueError, match="give a microbatch size"):
        largest_microbatch_size(compile_step, batch_size=2, memory_budget=1)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        largest_microbatch_size(compile_clipped_gradient, batch_size=0, memory_budget=1)


@pytest.mark.parametrize("stats", [None, {}, {"bytes_limit": 0}, {"bytes_in_use": 5}])
def test_budget_of_devices_that_report_nothing_is_a_share_of_the_machine(stats, monkeypatch):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)] * 2)
    assert default_memory_budget() == int(HOST_SHARE * physical / 2)


def test_budget_of_a_device_that_reports(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device, device])
    assert default_memory_budget() == DEVICE_SHARE * 1000
    compile_step, _ = made_up(lambda size: 100 * size)
    assert largest_microbatch_size(compile_step, batch_size=16) == 8
    assert largest_microbatch_size(compile_step, batch_size=16, memory_budget=None) == 8
