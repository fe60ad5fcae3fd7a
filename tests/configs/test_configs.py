"""Every config of configs/ loads, fits configs/base.py, and tells where it comes from and how to run it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from configs import base, glue, table_to_text
from dp_rmt.finetuning import arms, assemble
from dp_rmt.finetuning.checks import arm_settings
from dp_rmt.finetuning.settings import Settings
from dp_rmt.trees import leaves_by_path

FOLDER = Path(base.__file__).parent
SHARED = {"__init__", "base", "choices", "customersim_recipe", "update_rules"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)
GLUE = {"sst2": 67_349, "qnli": 104_743, "qqp": 363_846, "mnli": 392_702}
"""Training examples of GLUE (Wang et al. 2019)."""


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_tells_its_source_number_cost_and_command(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.name == {"glue": "sst2_roberta_base", "table_to_text": "e2e_gpt2"}.get(name, name)
    assert config.is_locked
    assert set(config) == set(base.get_config())
    assert all(arm.arms == {} for arm in arm_settings(Settings.from_config(config)).values())
    assert base.as_config(Settings.from_config(config)).to_dict() == config.to_dict()
    for part in ("Source: ", "Expected: ", "Cost: ", "Command: "):
        assert module.__doc__.count(part) == 1, part
    assert f"python -m experiments.finetune --config=configs/{name}.py" in module.__doc__


@pytest.mark.parametrize("size", glue.SIZES)
@pytest.mark.parametrize(
    ("task", "num_steps"),
    [("sst2", 202), ("qnli", 314), ("qqp", 1092), ("mnli", 1178)],  # 3 epochs of N / 1000 each
)
def test_glue_configs_follow_the_recipe(task: str, num_steps: int, size: str) -> None:
    config = Settings.from_config(glue.get_config(f"{task},{size}"))
    assert config.name == f"{task}_roberta_{size}"
    assert config.arms == {}
    assert (config.data.task, config.model.path, config.model.head) == (task, f"roberta-{size}", "infilling")
    assert (config.privacy.l2_clip_norm, config.train.learning_rate) == (0.1, 5e-4)
    assert (config.whitening.where, config.optimizer[1]["b1"], config.denoise) == ("before_clipping", 0.5, ())
    # Without noise: it spares the calibration, which has no say in the number of steps.
    mechanism, delta = assemble.build_mechanism(config.changed({"privacy.epsilon": math.inf}), GLUE[task])
    assert mechanism.num_steps == num_steps
    assert mechanism.expected_batch_size == 1000 * glue.SCALE[task]
    assert delta == GLUE[task] ** -1.1
    seen = int(config.train.epochs) * GLUE[task]
    assert row_of_cost(glue, f"{task},{size}")[:3] == [f"{GLUE[task]:,}", f"{num_steps:,}", f"{seen:,}"]


@pytest.mark.parametrize("tuning", table_to_text.LEARNING_RATE)
@pytest.mark.parametrize("model", table_to_text.MODELS)
@pytest.mark.parametrize(("task", "num_examples", "num_steps"), [("e2e", 42_061, 411), ("dart", 62_659, 918)])
def test_text_configs_follow_the_recipe(task: str, num_examples: int, num_steps: int, model: str, tuning: str) -> None:
    config = table_to_text.get_config(f"{task},{model},{tuning}")
    (checked,) = arm_settings(Settings.from_config(config)).values()
    assert (checked.model.tuning, checked.model.head, checked.data.task) == (tuning, "causal_lm", task)
    assert checked.model.path == table_to_text.MODELS[model]
    is_whitened = (model, tuning) == ("gpt2", "full")
    assert (checked.whitening.where != "nowhere", checked.denoise) == (is_whitened, ())
    assert config.name == f"{task}_{model}" + {"full": "", "lora": "_lora"}[tuning]
    mechanism, delta = assemble.build_mechanism(checked.changed({"privacy.epsilon": math.inf}), num_examples)
    assert (mechanism.num_steps, delta) == (num_steps, {"e2e": 8e-6, "dart": 1e-5}[task])
    seen = int(config.train.epochs) * num_examples
    assert row_of_cost(table_to_text, f"{task},{model}")[:3] == [f"{num_examples:,}", f"{num_steps}", f"{seen:,}"]


def row_of_cost(module: ModuleType, choice: str) -> list[str]:
    """The cells behind a choice in the table of costs of a docstring."""
    costs = module.__doc__.split("Cost: ")[1]
    (row,) = [line.split() for line in costs.splitlines() if line.split()[:1] == [choice]]
    return row[1:]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [("", "e2e,gpt2,full"), ("dart", "dart,gpt2,full"), ("e2e,qwen3_4b", "e2e,qwen3_4b,full")],
)
def test_a_choice_that_is_left_out_is_the_first(given: str, chosen: str) -> None:
    assert table_to_text.get_config(given) == table_to_text.get_config(chosen)


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (
            "table_to_text",
            "e2e,gpt2,lorra",
            "TASK,MODEL,TUNING, where task is one of e2e, dart; model is one of gpt2, .*",
        ),
        ("table_to_text", "e2e,lora", ".*; tuning is one of full, lora"),
        ("glue", "base,sst2", "TASK,SIZE, where task is one of sst2, qnli, qqp, mnli; size is one of base, large"),
        ("glue", "sst2,base,lora", "TASK,SIZE, where task is one of sst2, qnli, qqp, mnli; size is one of base, large"),
        ("customersim", "gpt5", "MODEL, where model is one of pythia_160m, gemma3_1b, llama3_2_1b, qwen3_0_6b"),
        ("e2e_stories260k", "e2", "TASK, where task is one of e2e, dart"),
    ],
)
def test_an_unknown_choice_is_answered_with_all_there_are(config: str, given: str, said: str) -> None:
    get_config = importlib.import_module(f"configs.{config}").get_config
    with pytest.raises(ValueError, match=rf"--config=configs/{config}\.py:{given}: after the colon stands {said}$"):
        get_config(given)


@pytest.mark.parametrize("name", ["customersim", "customersim_stories260k"])
def test_every_arm_of_the_study_of_memorisation(name: str) -> None:
    configs = arm_settings(Settings.from_config(importlib.import_module(f"configs.{name}").get_config()))
    private = {arm for arm, config in configs.items() if math.isfinite(config.privacy.epsilon)}
    assert private == {"full_noisy", "full_denoised", "lora_8_noisy", "lora_8_denoised"}
    assert set(configs) - private == {"full", "lora_2", "lora_8", "lora_32"}
    for arm, config in configs.items():
        assert bool(config.denoise) == arm.endswith("denoised")
        assert config.model.tuning == arm.partition("_")[0]
        if arm.startswith("lora"):
            assert config.model.lora.rank == int(arm.split("_")[1]) == config.model.lora.alpha / 2


def test_the_study_of_memorisation_takes_its_model_from_the_hub() -> None:
    get_config = importlib.import_module("configs.customersim").get_config
    assert get_config("qwen3_0_6b").model.path == "Qwen/Qwen3-0.6B-Base"


@pytest.mark.slow
def test_the_noise_of_the_published_sst2_run() -> None:
    settings = Settings.from_config(glue.get_config("sst2,large")).changed({"privacy.epsilon": 3.0})
    mechanism, _ = assemble.build_mechanism(settings, GLUE["sst2"])
    # Without truncation .7718, too: batches of 1,184 overflow too rarely to be seen in four digits.
    assert mechanism.noise_multiplier == pytest.approx(0.7718, abs=5e-5)


@pytest.mark.thorough
def test_what_the_recipe_trains_has_ghost_rules_in_a_roberta(
    make_model: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    small = {  # a length group more is a trace more
        "data": {"path": str(corpus), "cache_dir": str(tmp_path / "cache"), "length_groups": ()},
        "model.path": str(make_model(tmp_path, architecture="roberta", max_length=256)),
        "privacy": {"epsilon": math.inf, "expected_batch_size": 24},
    }
    config = Settings.from_config(glue.get_config("sst2,base")).changed(small)
    (arm,) = arms.prepare(config, tmp_path / "run")
    assert not leaves_by_path(arm.run.state.frozen)
    assert "mlm_head/bias" in dict(leaves_by_path(arm.run.state.params))
