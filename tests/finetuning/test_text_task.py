"""Text from tables: from a folder of CSV files and a random Llama to scored text, merged model and adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from small_tables import GREEDY, NAMES, write_e2e

from dp_rmt.finetuning import arms, texts
from dp_rmt.finetuning.assemble import load_task
from dp_rmt.finetuning.settings import Settings
from dp_rmt.models import load_pretrained
from dp_rmt.models.peft.adapter import load_adapter
from dp_rmt.training.losses import completion_losses
from dp_rmt.training.metrics import read_metrics
from dp_rmt.trees import leaves_by_path

pytestmark = pytest.mark.usefixtures("no_java")
DENOISED = Settings().denoise


@pytest.fixture(scope="module")
def e2e(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "e2e"
    write_e2e(folder)
    return folder


@pytest.fixture(scope="module")
def text_config(make_config: Callable[..., Settings], e2e: Path, restaurant_llama: Path) -> Callable[..., Settings]:
    def build(changes: dict | None = None) -> Settings:
        return make_config({**GREEDY, "data.path": str(e2e), "model.path": str(restaurant_llama), **(changes or {})})

    return build


def run(config: Settings, workdir: Path) -> arms.Arm:
    (arm,) = arms.prepare(config, workdir)
    arms.train(arm)
    arms.report(workdir)
    return arm


@pytest.fixture(scope="module")
def whole(text_config: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, arms.Arm]:
    """A run that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(text_config(), folder)


@pytest.mark.thorough
def test_from_tables_to_scored_text(text_config, tmp_path: Path) -> None:
    changes = {
        "privacy.epsilon": math.inf,
        "train.num_steps": 60,
        "train.learning_rate": 2e-2,
        "train.schedule": "constant",
        "train.eval_every": 20,
    }
    arm = run(text_config(changes), tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["eval/dev/loss"] for line in metrics if "eval/dev/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["bleu"] > 0.3
    assert metrics[-1]["eval/test/bleu"] == scores["bleu"]
    written = [json.loads(line) for line in (tmp_path / "run" / "texts.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in written) == list(range(len(arm.task.prompts.sources)))
    assert all(line["source"] == arm.task.prompts.sources[line["row"]] for line in written)
    assert any(line["text"].startswith(tuple(name.lower() for name in NAMES)) for line in written)
    assert {line["verbatim_from"] for line in written} == {"test"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "This page shows rows of test word for word." in page
    assert "show rows of `test` word for word" in (tmp_path / "run" / "privacy.md").read_text()
    assert "What the models write" in page
    assert written[0]["text"] in page
    assert "| evaluated on | dev, test |" in (tmp_path / "run" / "privacy.md").read_text()


@pytest.mark.slow
def test_the_saved_model_has_the_loss_that_was_reported(whole: tuple[Path, arms.Arm]) -> None:
    folder, arm = whole
    module, params = load_pretrained(folder / "model", head="causal_lm", key=jax.random.key(1))
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/dev/loss" in line][-1]
    losses = completion_losses(module)(params, arm.task.evaluations["dev"])
    assert float(np.mean(losses)) == pytest.approx(last["eval/dev/loss"], rel=1e-5)


@pytest.mark.parametrize("most", [None, 3, 100])
def test_prompts_are_spread_over_the_split(text_config, most: int | None) -> None:
    """With dev trained on, the loss is watched on the rows that are written for."""
    every = load_task(text_config()).prompts.sources
    assert len(every) == len(set(every)) > 9
    task = load_task(text_config({"data.train_split": "dev", "generation.max_prompts": most}))
    assert task.prompts.sources == every[:: math.ceil(len(every) / most) if most else 1]
    assert task.num_examples == 12
    assert task.evaluations.keys() == {"test"}
    references = [text for texts in task.prompts.references for text in texts]
    assert len(task.evaluations["test"]["input_ids"]) == len(references)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "ffa_lora"])
def test_low_rank_updates_alone_train_and_are_saved_merged_and_apart(tuning: str, text_config, tmp_path: Path) -> None:
    changes = {"model.tuning": tuning, "model.lora.rank": 4, "denoise": DENOISED, "generation.max_prompts": 2}
    arm = run(text_config(changes), tmp_path / "run")
    trained = {path for path, _ in leaves_by_path(arm.run.state.params)}
    factors = ("a", "b") if tuning == "lora" else ("b",)
    assert trained == {
        f"decoder/layers/attention/{name}_lora/lora_{factor}/kernel"
        for name in ("query", "value")
        for factor in factors
    }
    restored = arm.run.checkpoints(tmp_path / "run").restore(arm.run.state)
    assert restored is not None
    params = arm.run.published_params(restored[0])
    batch = {name: values[:4] for name, values in arm.task.evaluations["dev"].items()}
    expected = arm.task.losses(params, batch)
    assert not np.allclose(expected, arm.task.losses(arm.task.params, batch), atol=1e-6)
    module, merged = load_pretrained(tmp_path / "run" / "model", head="causal_lm", key=jax.random.key(1))
    np.testing.assert_allclose(completion_losses(module)(merged, batch), expected, rtol=2e-6)
    adapter = dict(leaves_by_path(load_adapter(tmp_path / "run" / "adapter", arm.task.module)))
    for path, leaf in leaves_by_path(params):
        if "lora_" in path:
            np.testing.assert_array_equal(adapter[path], leaf)


@pytest.mark.slow
def test_text_goes_on_where_it_was_interrupted(
    whole: tuple[Path, arms.Arm], text_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, arm = whole
    assert len(arm.task.prompts.sources) > 9  # two batches
    real, calls = texts.generate_texts, []

    def dies(*args, done, **kwargs):
        calls.append(len(done))
        for number, row in enumerate(real(*args, done=done, **kwargs)):
            if len(calls) == 1 and number == 8:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(texts, "generate_texts", dies)
    with pytest.raises(KeyboardInterrupt):
        run(text_config(), tmp_path / "run")
    path = tmp_path / "run" / "texts.jsonl"
    assert not (tmp_path / "run" / "scores.json").exists()
    path.write_bytes(path.read_bytes()[:-5])  # as a killed process leaves it
    run(text_config(), tmp_path / "run")
    assert calls == [0, 7]
    expected = sorted((uninterrupted / "texts.jsonl").read_text().splitlines())
    assert sorted(path.read_text().splitlines()) == expected
    assert (tmp_path / "run" / "scores.json").read_text() == (uninterrupted / "scores.json").read_text()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.head": "classification"}, ["'e2e'", "'classification' do not go together", "need 'causal_lm'"]),
        ({"model.tuning": "bias"}, ["config.model.tuning='bias'", "this model has none"]),
        ({"model.tuning": "lora", "model.trainable": "lora"}, ["'lora' says itself what trains"]),
        ({"model.tuning": "lora", "model.lora.targets": ("querry",)}, ["config.model.tuning='lora'", "querry"]),
        ({"data.max_length": 65}, ["config.data.max_length=65 is more than the 64 tokens"]),
        ({"generation.max_new_tokens": 55}, ["Prompt", "max_length=9"]),
        ({"generation.num_beams": 0, "generation.method": "beam"}, ["config.generation: Beam: num_beams is 0"]),
    ],
)
def test_what_does_not_fit_is_said_before_training(changes, parts, text_config, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        arms.prepare(text_config(changes), tmp_path / "run")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_malformed_row_is_named(text_config, e2e: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in e2e.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lines = (folder / "trainset.csv").read_text().splitlines()
    lines[4] = lines[4].split('",')[0] + '"'
    (folder / "trainset.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"trainset\.csv.*line 5"):
        arms.prepare(text_config({"data.path": str(folder)}), tmp_path / "run")
