"""The profile of a step: its command on a tiny model, and what it reads in traces and in the text of programs."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import experiments
from experiments.benchmarks.step import trace

ROOT = Path(experiments.__file__).parents[1]


def text_of(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_examples_in_docstrings() -> None:
    outcome = doctest.testmod(trace)
    assert outcome.attempted
    assert not outcome.failed


def test_time_of_what_lies_inside_is_not_counted_twice() -> None:
    """Two calls of a loop, a choice inside the first, and the end of one at the start of the next."""
    spans = [
        (0.0, 10.0, "while"),
        (2.0, 8.0, "conditional"),
        (3.0, 7.0, "dot"),
        (10.0, 14.0, "while"),
        (14.0, 15.0, "add"),
    ]
    assert trace.self_times(spans) == {"while": 8, "conditional": 2, "dot": 4, "add": 1}


def test_kinds_parts_and_sources_of_a_program() -> None:
    def program(x: jax.Array) -> Any:
        with jax.named_scope("noise"):
            noisy = jnp.sin(x) + 1
        with jax.named_scope("squared_norm"):
            product = noisy @ noisy
        return jnp.sort(product), jax.lax.fori_loop(0, 9, lambda _, c: c @ x, x)

    known = trace.operations(text_of(program, jnp.ones((64, 64))), ROOT)
    found = {(one.kind, one.part) for one in known.values()}
    assert ("entry by entry", "noise") in found
    assert ("matrix products", "norms of clipping") in found
    assert ("scatter, gather, sort", "the rest") in found
    assert "loops, choices, calls" in {one.kind for one in known.values()}
    here = Path(__file__).relative_to(ROOT)
    assert any(one.source.startswith(f"{here}:") for one in known.values())


def test_what_waits_for_the_host_is_counted() -> None:
    def calls_back(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert trace.host_transfers(text_of(calls_back, jnp.float32(1))) > 0
    assert trace.host_transfers(text_of(jnp.sin, jnp.float32(1))) == 0


@pytest.mark.slow
def test_the_command_accounts_for_the_traced_time(run_side_by_side: Callable[..., dict[str, Any]]) -> None:
    command = ["-W", "error", "-m", "experiments.benchmarks.step.profile", "--batch_size=2", "--sequence_length=8"]
    sizes = ["--num_layers=1", "--repeats=1", "--traced=1"]
    ended = run_side_by_side(
        command,
        "--results",
        {"good": ["--model=tiny", *sizes], "unknown": ["--model=tiny", *sizes, "--programs=magic"]},
    )
    assert ended["unknown"].code == 1
    assert "magic is unknown" in ended["unknown"].stderr
    assert ended["good"].code == 0, ended["good"].stderr
    (path,) = ended["good"].folder.iterdir()
    assert path.name == "tiny-cpu-float32-b2-s8-l1-profile.json"
    programs = json.loads(path.read_text())["programs"]
    assert list(programs) == ["plain", "bookkeeping", "noisy"]
    for name, program in programs.items():
        for group in ("kinds", "parts"):
            assert sum(program[group].values()) == pytest.approx(program["traced_seconds"])
            assert min(program[group].values()) >= 0
        assert "not in the program's text" not in program["kinds"]
        assert program["host_transfers"] == 0
        assert ("noise" in program["parts"]) == (name == "noisy")
        assert ("norms of clipping" in program["parts"]) == (name != "plain")
    assert programs["plain"]["flops"] < programs["bookkeeping"]["flops"] < programs["noisy"]["flops"]
