"""A small generated GLUE folder, small random models, and settings that train one of them on it in seconds."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import experiments
from dp_rmt.data import build_word_tokenizer, generate_reviews, write_corpus
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import (
    CausalLanguageModel,
    DecoderConfig,
    EncoderConfig,
    MaskedLanguageModel,
    init_params,
    save_pretrained,
)

NUM_TRAIN, NUM_DEV, MAX_LENGTH = 120, 30, 24


@pytest.fixture(scope="session")
def compilation_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compilation_cache_dir: str) -> Iterator[None]:
    """Else most of the time would go into compiling one step again and again, to run it on three batches."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in options}
    _configure(options)
    yield
    _configure(before)


def _configure(options: dict[str, Any]) -> None:
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder, num_public=400, num_private_train=NUM_TRAIN, num_private_dev=NUM_DEV, seed=0)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """``(folder, architecture=, max_length=) -> folder`` of a random model."""
    return _make_model


def _make_model(folder: Path, *, architecture: str = "bert", max_length: int = MAX_LENGTH) -> Path:
    """A random encoder with a masked-LM head and a tokenizer of the words of reviews, as a Hugging Face folder."""
    texts = [review for review, _ in generate_reviews(400, 0, domain="public")]
    tokenizer = build_word_tokenizer([*texts, "it was great , it was terrible"], folder / "tokenizer")
    config = EncoderConfig(
        architecture=architecture,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=max_length + (tokenizer.pad_token_id + 1) * (architecture == "roberta"),
        type_vocab_size=2 if architecture == "bert" else 1,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = MaskedLanguageModel(config)
    save_pretrained(folder / "model", module, init_params(module, jax.random.key(0)), tokenizer=tokenizer)
    return folder / "model"


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """``(folder, words, max_length=) -> folder`` of a random Llama."""
    return _make_llama


def _make_llama(folder: Path, words: str, *, max_length: int) -> Path:
    """A random decoder and a tokenizer of these words, as a Hugging Face folder."""
    tokenizer = build_word_tokenizer([words] * 2, folder / "tokenizer")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )
    module = CausalLanguageModel(config)
    save_pretrained(folder / "model", module, init_params(module, jax.random.key(0)), tokenizer=tokenizer)
    return folder / "model"


@pytest.fixture(scope="session")
def make_config(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    """``(changes) -> settings`` that differ from the small ones in some keys, such as ``{"privacy.epsilon": 1.0}``."""
    return functools.partial(_make_config, corpus, model, tmp_path_factory.mktemp("tokenised"))


def _make_config(corpus: Path, model: Path, cache_dir: Path, changes: dict[str, Any] | None = None) -> Settings:
    """Three steps on batches of about 24 of 120 examples, one arm, no denoising."""
    small = {
        "name": "small",
        "data": {"path": str(corpus), "cache_dir": str(cache_dir), "max_length": MAX_LENGTH, "length_groups": ()},
        "model": {"path": str(model), "trainable": "^(?!encoder/embeddings)"},
        "privacy": {"epsilon": 0.5, "delta": 1e-3, "expected_batch_size": 24},  # a small epsilon is the faster one
        "privacy.sampling_seed": 1,
        "privacy.noise_seed": 2,
        "denoise": (),
        "train": {"num_steps": 3, "microbatch_size": 8, "eval_every": 2, "checkpoint_every": 2, "eval_batch_size": 32},
    }
    return Settings.from_config(small).changed(changes or {})


class Ended(NamedTuple):
    """A command that has run: its exit status, what it printed, and the folder that it was given."""

    code: int
    stdout: str
    stderr: str
    folder: Path


@pytest.fixture
def statement() -> dict[str, Any]:
    """What a run's privacy.json says."""
    return {
        "is_private": True,
        "epsilon": 1.5,
        "delta": 1e-5,
        "noise_multiplier": 2.0,
        "sampling_probability": 0.02,
        "expected_batch_size": 200.0,
        "max_batch_size": 400,
        "num_examples": 10_000,
        "num_steps": 4,
    }


@pytest.fixture(scope="session")
def run_side_by_side(
    compilation_cache_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str], str, Mapping[str, Sequence[str]]], dict[str, Ended]]:
    """``(python's arguments, flag of the output folder, {name: further arguments}) -> {name: Ended}``."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as above, with its cache
        "JAX_COMPILATION_CACHE_DIR": compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(command: Sequence[str], folder_flag: str, arguments: Mapping[str, Sequence[str]]) -> dict[str, Ended]:
        folders = {name: tmp_path_factory.mktemp("command") / name for name in arguments}
        processes = {
            name: subprocess.Popen(
                [sys.executable, *command, *given, f"{folder_flag}={folders[name]}"],
                cwd=Path(experiments.__file__).parents[1],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            for name, given in arguments.items()
        }
        try:
            outputs = {name: process.communicate(timeout=600) for name, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
        return {name: Ended(processes[name].returncode, *outputs[name], folders[name]) for name in arguments}

    return run
