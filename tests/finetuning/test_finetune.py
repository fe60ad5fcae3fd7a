"""The main job, end to end: a generated GLUE folder and a small random model in, a model and a report out."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from dp_rmt.data import get_task, label_word_ids
from dp_rmt.data.length_groups import group_by_length
from dp_rmt.finetuning import arms
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import load_pretrained, load_tokenizer
from dp_rmt.training.losses import infilling_logits, label_losses
from dp_rmt.training.metrics import read_metrics
from dp_rmt.trees import leaves_by_path

MakeConfig = Callable[..., Settings]
FILES = {
    "config.json",
    "ledger.jsonl",
    "metrics.jsonl",
    "privacy.json",
    "privacy.md",
    "report.html",
    "checkpoints",
    "model",
}


DENOISED = Settings().denoise


def run(config: Settings, workdir: Path, *, until: int | None = None) -> list[arms.Arm]:
    """What `experiments.finetune` does with a config."""
    prepared = arms.prepare(config, workdir)
    for arm in prepared:
        arms.train(arm, until=until)
    arms.report(workdir)
    return prepared


def without_times(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def two_arms(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[arms.Arm]]:
    """A run with denoising and one without."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    config = make_config({"arms": {"denoised": {"denoise": DENOISED}, "noisy": {}}})
    return workdir, run(config, workdir)


def test_a_workdir_has_all_its_files_and_one_report_shows_both_arms(two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, _ = two_arms
    assert {path.name for path in workdir.iterdir()} == {"config.json", "report.html", "denoised", "noisy"}
    for arm in ("denoised", "noisy"):
        assert {path.name for path in (workdir / arm).iterdir()} == FILES - {"report.html"}
    html = (workdir / "report.html").read_text(encoding="utf-8")
    assert "denoised" in html
    assert "noisy" in html
    config = json.loads((workdir / "config.json").read_text())
    denoised = json.loads(json.dumps(DENOISED))  # tuples are lists in JSON
    assert config["arms"] == {"denoised": {"denoise": denoised}, "noisy": {}}
    assert json.loads((workdir / "denoised" / "config.json").read_text())["denoise"] == denoised


def test_the_advice_stands_in_the_metrics_the_last_lines_and_the_page(
    two_arms: tuple[Path, list[arms.Arm]],
) -> None:
    """Two slopes of three steps; the gradients of the small model do not stand above the noise of epsilon 0.5."""
    workdir, _ = two_arms
    for name in ("denoised", "noisy"):
        lines = [line for line in read_metrics(workdir / name / "metrics.jsonl") if "learning_rate" in line]
        slopes = [line["advice/slope"] for line in lines]
        assert slopes[0] is None  # there was no step before the first
        assert all(abs(slope) < 6 for slope in slopes[1:])
        assert all(0 < line["advice/top_over_edge"] < 1.2 for line in lines)
    printed = arms.report(workdir).splitlines()
    for name in ("denoised", "noisy"):
        (line,) = [line for line in printed if line.startswith(f"Advice for {name}: ")]
        assert "of 2 steps overshot" in line
    assert "of 2 steps overshot" in (workdir / "report.html").read_text(encoding="utf-8")


def test_every_line_of_the_metrics_is_json_with_a_step(two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, _ = two_arms
    for name in ("denoised", "noisy"):
        lines = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 3]  # evaluated at 0, 2 and 3
        assert [line["step"] for line in lines if "eval/dev/accuracy" in line] == [0, 2, 3]
        training = [line for line in lines if "learning_rate" in line]
        assert [line["learning_rate"] for line in training] == pytest.approx([5e-4, 5e-4 * 2 / 3, 5e-4 / 3])
        epsilons = [line["epsilon"] for line in training]
        assert epsilons == sorted(epsilons)
        assert 0.4999 < epsilons[-1] <= 0.5
        assert all(0 < line["nonprivate/clipped_fraction"] <= 1 for line in training)
        kept = [sum(sum(ranks) for ranks in line.get("denoise/kept_rank", {}).values()) for line in training]
        assert any(kept) == (name == "denoised")
        # Where the denoiser keeps nothing, or there is none, the update is the noisy gradient itself.
        changed = [line["nonprivate/cosine_noisy"] != line["nonprivate/cosine_denoised"] for line in training]
        assert changed == [rank > 0 for rank in kept]


def test_arms_share_batches_and_noise(two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, _ = two_arms
    first = [read_metrics(workdir / name / "metrics.jsonl")[1] for name in ("denoised", "noisy")]
    shared = ("batch_size", "loss", "grad_norm", "cosine_noisy")
    assert [first[0][f"nonprivate/{name}"] for name in shared] == pytest.approx(
        [first[1][f"nonprivate/{name}"] for name in shared], rel=1e-5
    )


def test_the_privacy_statement_has_the_numbers_of_the_run(two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, prepared = two_arms
    statement = json.loads((workdir / "noisy" / "privacy.json").read_text())
    assert statement["is_private"] is True
    assert (statement["num_steps"], statement["num_examples"], statement["delta"]) == (3, 120, 1e-3)
    assert 0.4999 < statement["epsilon"] == statement["epsilon_pld"] <= 0.5 < statement["epsilon_rdp"]
    assert statement["noise_multiplier"] == prepared[1].run.loop.mechanism.noise_multiplier
    assert statement["noise_std"] == pytest.approx(statement["noise_multiplier"] * 0.1 / 24)
    assert statement["seeds_from"] == "given in the config"
    text = (workdir / "noisy" / "privacy.md").read_text()
    assert "differentially private" in text
    assert "given in the config" in text


def test_the_saved_model_is_the_trained_one(two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, prepared = two_arms
    arm = prepared[1]
    module, params = load_pretrained(workdir / "noisy" / "model", num_labels=2, key=jax.random.key(9))
    assert load_tokenizer(workdir / "noisy" / "model").get_vocab() == arm.task.tokenizer.get_vocab()
    batch = {name: values[:8] for name, values in arm.task.evaluations["dev"].items()}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    restored = arm.run.checkpoints(workdir / "noisy").restore(arm.run.state)
    assert restored is not None
    trained = arm.run.published_params(restored[0])
    logits = module.apply({"params": params}, *inputs)
    np.testing.assert_array_equal(logits, arm.task.module.apply({"params": trained}, *inputs))
    before = arm.task.module.apply({"params": arm.task.params}, *inputs)
    assert float(np.abs(logits - before).max()) > 1e-4  # it has learnt something


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    two_arms: tuple[Path, list[arms.Arm]], make_config: MakeConfig, tmp_path: Path
) -> None:
    workdir, _ = two_arms
    run(make_config(), tmp_path / "run", until=2)
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["num_steps"] == 2
    assert 0.25 < statement["epsilon"] < 0.5
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "left by a kill')
    run(make_config(), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert without_times(tmp_path / "run") == without_times(workdir / "noisy")
    resumed, expected = (
        safetensors.numpy.load_file(folder / "model" / "model.safetensors")
        for folder in (tmp_path / "run", workdir / "noisy")
    )
    assert resumed.keys() == expected.keys()
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(make_config: MakeConfig, two_arms: tuple[Path, list[arms.Arm]]) -> None:
    workdir, _ = two_arms
    before = (workdir / "noisy" / "metrics.jsonl").read_bytes()
    run(make_config({"arms": {"denoised": {"denoise": DENOISED}, "noisy": {}}}), workdir)
    assert (workdir / "noisy" / "metrics.jsonl").read_bytes() == before


@pytest.mark.thorough
def test_a_checkpoint_of_other_data_is_refused_before_anything_is_written(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_bytes((corpus / name).read_bytes())
    config = make_config({"data.path": str(data), "privacy.epsilon": math.inf})
    run(config, tmp_path / "run", until=1)
    header, first, *rest = (data / "train.tsv").read_text().splitlines()
    (data / "train.tsv").write_text("\n".join([header, "the " + first, *rest]) + "\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"belongs to another experiment:\n  train_data: checkpoint .*\nGoing on"):
        arms.prepare(config, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.slow
def test_clipping_method_and_length_groups_change_nothing(
    two_arms: tuple[Path, list[arms.Arm]], make_config: MakeConfig, tmp_path: Path
) -> None:
    workdir, _ = two_arms
    run(make_config({"train.clipping_method": "vmap", "data.length_groups": (12,)}), tmp_path / "run")
    vmap, ghost = without_times(tmp_path / "run"), without_times(workdir / "noisy")
    assert len(vmap) == len(ghost)
    for line, expected in zip(vmap, ghost):
        missing = {key for key, value in expected.items() if value is None}  # no slope before the first step
        assert {key for key, value in line.items() if value is None} == missing
        numbers, wanted = ({k: v for k, v in of.items() if k not in missing} for of in (line, expected))
        assert numbers == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_the_microbatch_size_is_found_by_compiling(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest power of two in a quarter of the expected batch of 24, and less where memory is short."""
    config = make_config({"train.microbatch_size": "auto", "data.length_groups": ()})
    (arm,) = arms.prepare(config, tmp_path / "run")
    assert arm.run.loop.microbatch_size == 4
    assert arm.settings.train.microbatch_size == "auto"  # what the workdir records, and a resumed run is compared with
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(arm.run.state.params))
    # One example takes 220 kB, beside the five copies of what is trained.
    monkeypatch.setattr("dp_rmt.training.microbatches.default_memory_budget", lambda: 4 * trained + 100_000)
    with pytest.raises(ValueError, match="one example at a time needs"):
        arms.prepare(config, tmp_path / "too_small")
    monkeypatch.setattr("dp_rmt.training.microbatches.default_memory_budget", lambda: 4 * trained + 250_000)
    (arm,) = arms.prepare(config, tmp_path / "small")
    assert arm.run.loop.microbatch_size in (1, 2)


@pytest.mark.slow
def test_without_privacy_nothing_is_clipped_and_nothing_promised(make_config: MakeConfig, tmp_path: Path) -> None:
    (arm,) = run(make_config({"privacy.epsilon": math.inf, "denoise": DENOISED}), tmp_path / "run")
    mechanism = arm.run.loop.mechanism
    assert (mechanism.noise_std, mechanism.l2_clip_norm) == (0.0, math.inf)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in line]
    assert all(line["epsilon"] is None for line in lines)
    assert all(line["nonprivate/clipped_fraction"] == 0 for line in lines)
    assert all(line["nonprivate/cosine_noisy"] == pytest.approx(1, abs=1e-5) for line in lines)
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["is_private"] is False
    assert statement["epsilon"] is statement["epsilon_rdp"] is statement["target_epsilon"] is None
    assert "There is no privacy guarantee" in (tmp_path / "run" / "privacy.md").read_text()


@pytest.mark.slow
def test_text_infilling_from_prompt_to_saved_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"model.head": "infilling", "model.trainable": ".*", "privacy.epsilon": math.inf})
    (arm,) = run(config, tmp_path / "run")
    before = dict(leaves_by_path(arm.task.params))
    assert "mask_position" in arm.run.loop.arrays
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    module, params = load_pretrained(tmp_path / "run" / "model", head="masked_lm", key=jax.random.key(9))
    logits = infilling_logits(module, label_word_ids(arm.task.tokenizer, get_task("sst2").infilling))
    dev = arm.task.evaluations["dev"]
    outputs = logits(params, dev)
    assert np.mean(label_losses(outputs, dev["label"])) == pytest.approx(last["eval/dev/loss"], rel=1e-5)
    assert np.mean(np.argmax(outputs, axis=1) == dev["label"]) == pytest.approx(last["eval/dev/accuracy"])
    changed = {path for path, leaf in leaves_by_path(params) if not np.array_equal(leaf, before[path])}
    assert changed == set(before)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_counted_and_contributes_nothing(
    make_config: MakeConfig, corpus: Path, model: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    tensors = safetensors.numpy.load_file(broken / "model.safetensors")
    sentences = [line.split("\t")[0] for line in (corpus / "train.tsv").read_text().splitlines()[1:]]
    counts = Counter(word for sentence in sentences for word in set(sentence.split()))
    vocabulary = load_tokenizer(model).get_vocab()
    word = vocabulary[min(word for word, count in counts.items() if 10 <= count <= 30 and word in vocabulary)]
    tensors["bert.embeddings.word_embeddings.weight"][word] = np.inf
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    safetensors.numpy.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (arm,) = arms.prepare(make_config({"model.path": str(broken)}), tmp_path / "run")
    # Texts with the word have no class, which an evaluation refuses.
    unseen = dataclasses.replace(arm.run.loop, evaluators={})
    arm = dataclasses.replace(arm, run=dataclasses.replace(arm.run, loop=unseen))
    states = [jax.tree.map(np.array, arm.run.state) for _ in range(2)]  # training donates the state
    arms.train(arm)
    loop = arm.run.loop
    has_word = np.any(loop.arrays["input_ids"] == word, axis=1)
    samples = [loop.mechanism.sampling(1).indices(step) for step in range(3)]
    expected = [int(np.sum(has_word[sample[sample >= 0]])) for sample in samples]
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in line]
    assert [line["nonprivate/nonfinite_examples"] for line in lines] == expected
    assert all(0 < count < np.sum(sample >= 0) for count, sample in zip(expected, samples))

    without = np.where((samples[0] >= 0) & has_word[samples[0]], -1, samples[0])
    after = []
    for state, sample in zip(states, (samples[0], without)):
        groups = group_by_length(loop.arrays, sample, lengths=loop.lengths, microbatch_size=8)
        after.append(loop.train_step(state, groups)[0].params)
    for leaf, same in zip(*map(jax.tree.leaves, after)):
        assert np.all(np.isfinite(leaf))
        np.testing.assert_allclose(leaf, same, rtol=0, atol=1e-5)  # a step of Adam is 5e-4
