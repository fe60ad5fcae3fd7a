"""Every config of configs/ loads, fits configs/base.py, and tells where it comes from and how to run it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import base
from configs.glue_recipe import SCALE, roberta
from dp_rmt.finetuning import arms, assemble
from dp_rmt.finetuning.settings import arm_configs
from dp_rmt.trees import leaves_by_path

FOLDER = Path(base.__file__).parent
SHARED = {"__init__", "base", "glue_recipe", "text_recipe", "customersim_recipe"}
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - SHARED)
GLUE = {"sst2": 67_349, "qnli": 104_743, "qqp": 363_846, "mnli": 392_702}
"""Training examples of GLUE (Wang et al. 2019)."""


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_tells_its_source_number_cost_and_command(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.name == name
    assert config.is_locked
    assert set(config) == set(base.get_config())
    assert all(len(arm.arms) == 0 for arm in arm_configs(config).values())
    for part in ("Source: ", "Expected: ", "Cost: ", "Command: "):
        assert module.__doc__.count(part) == 1, part
    assert f"python -m experiments.finetune --config=configs/{name}.py" in module.__doc__


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize(
    ("task", "num_steps"),
    [("sst2", 202), ("qnli", 314), ("qqp", 1092), ("mnli", 1178)],  # 3 epochs of N / 1000 each
)
def test_glue_configs_follow_the_recipe(task: str, num_steps: int, size: str) -> None:
    module = importlib.import_module(f"configs.{task}_roberta_{size}")
    config = module.get_config()
    assert config == roberta(task, size)
    assert len(config.arms) == 0
    assert (config.data.task, config.model.path, config.model.head) == (task, f"roberta-{size}", "infilling")
    assert (config.privacy.l2_clip_norm, config.optimizer.learning_rate) == (0.1, 5e-4)
    with config.unlocked():
        config.privacy.epsilon = math.inf  # spares the calibration, which has no say in the number of steps
    mechanism, delta = assemble.build_mechanism(config, GLUE[task])
    assert mechanism.num_steps == num_steps
    assert mechanism.expected_batch_size == 1000 * SCALE[task]
    assert delta == GLUE[task] ** -1.1
    assert f"({GLUE[task]:,} examples, {num_steps:,} updates)" in module.__doc__


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("model", ["gpt2", "llama3_2_1b", "llama3_2_3b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_4b"])
@pytest.mark.parametrize(("task", "num_examples", "num_steps"), [("e2e", 42_061, 411), ("dart", 62_659, 918)])
def test_text_configs_follow_the_recipe(task: str, num_examples: int, num_steps: int, model: str, tuning: str) -> None:
    module = importlib.import_module(f"configs.{task}_{model}")
    config = module.get_config(tuning)
    (checked,) = arm_configs(config).values()
    assert (checked.model.tuning, checked.model.head, checked.data.task) == (tuning, "causal_lm", task)
    assert config.name == f"{task}_{model}" + {"full": "", "lora": "_lora"}[tuning]
    with config.unlocked():
        config.privacy.epsilon = math.inf
    mechanism, delta = assemble.build_mechanism(config, num_examples)
    assert (mechanism.num_steps, delta) == (num_steps, {"e2e": 8e-6, "dart": 1e-5}[task])
    assert f"({num_examples:,} examples, {num_steps:,} updates)" in module.__doc__


def test_what_stands_after_the_colon_is_a_tuning() -> None:
    with pytest.raises(ValueError, match=r"e2e_gpt2\.py:lorra: after the colon stands 'full' or 'lora'"):
        importlib.import_module("configs.e2e_gpt2").get_config("lorra")


@pytest.mark.parametrize("name", ["customersim", "customersim_stories260k"])
def test_every_arm_of_the_study_of_memorisation(name: str) -> None:
    configs = arm_configs(importlib.import_module(f"configs.{name}").get_config())
    private = {arm for arm, config in configs.items() if math.isfinite(config.privacy.epsilon)}
    assert private == {"full_noisy", "full_denoised", "lora_8_noisy", "lora_8_denoised"}
    assert set(configs) - private == {"full", "lora_2", "lora_8", "lora_32"}
    for arm, config in configs.items():
        assert config.denoise.enabled == arm.endswith("denoised")
        assert config.model.tuning == arm.partition("_")[0]
        if arm.startswith("lora"):
            assert config.model.lora.rank == int(arm.split("_")[1]) == config.model.lora.alpha / 2


def test_what_stands_after_the_colon_is_a_model() -> None:
    get_config = importlib.import_module("configs.customersim").get_config
    assert get_config("qwen3_0_6b").model.path == "Qwen/Qwen3-0.6B-Base"
    with pytest.raises(ValueError, match=r"customersim\.py:gpt5: after the colon stands one of pythia_160m"):
        get_config("gpt5")


def test_the_noise_of_the_published_sst2_run() -> None:
    config = roberta("sst2", "large")
    with config.unlocked():
        config.privacy.epsilon = 3.0
    mechanism, _ = assemble.build_mechanism(config, GLUE["sst2"])
    # Without truncation .7718, too: batches of 1,184 overflow too rarely to be seen in four digits.
    assert mechanism.noise_multiplier == pytest.approx(0.7718, abs=5e-5)


def test_what_the_recipe_trains_has_ghost_rules_in_a_roberta(
    make_model: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    config = roberta("sst2", "base")
    with config.unlocked():
        config.data.path, config.data.cache_dir = str(corpus), str(tmp_path / "cache")
        config.data.length_groups = ()  # each is another trace
        config.model.path = str(make_model(tmp_path, architecture="roberta", max_length=256))
        config.privacy.epsilon, config.privacy.expected_batch_size = math.inf, 24
    (arm,) = arms.prepare(config, tmp_path / "run")
    assert not leaves_by_path(arm.run.state.frozen)
    assert "mlm_head/bias" in dict(leaves_by_path(arm.run.state.params))
