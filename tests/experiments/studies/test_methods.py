"""The study of methods, small: every arm trains, the learning rate is chosen as it says, nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import sst2_methods
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.workdir import as_json
from experiments.studies.methods import table as methods_table
from experiments.studies.methods.score import scored_split

ARMS = ("dp_adam",)  # the arms of all methods are tested in tests/finetuning/test_named_transforms.py
COMMAND = ["-m", "experiments.studies.methods.study", "--config=configs/sst2_methods.py"]


@pytest.fixture(scope="module")
def small(make_config: Callable[..., Settings]) -> list[str]:
    """Flags that make the task small, and the study short."""
    config = make_config()
    groups = {"data": config.data, "model": config.model, "privacy": config.privacy, "train": config.train}
    keys = [
        f"--config.{group}.{key}={value}"
        for group, options in groups.items()
        for key, value in options.as_dict().items()
        if value is not None and not isinstance(value, dict)
    ]
    size = config.privacy.expected_batch_size
    return [*keys, f"--batch_sizes={size}", "--epsilons=0.5", "--seeds=0", "--selection_steps=1"]


@pytest.fixture(scope="module")
def studies(small: list[str], run_side_by_side: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> dict[str, Any]:
    """A process of its own for each arm."""
    results = tmp_path_factory.mktemp("records")
    arguments = {name: [*small, f"--results={results}", f"--arms={name}", "--factors=1"] for name in ARMS}
    return run_side_by_side(COMMAND, "--workdir", arguments) | {"results": results}


def records(folder: Path, arm: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return [record for record in found if record["arm"] == arm]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_with_its_settings(arm: str, studies: dict[str, Any]) -> None:
    assert studies[arm].code == 0, studies[arm].stderr
    found = records(studies["results"], arm)
    whole = [record for record in found if record["steps"] == record["steps_of_the_schedule"]]
    assert len(whole) == 1
    changes = sst2_methods.get_config().arms[arm].to_dict()
    for key, value in as_json(Settings().changed(changes)).items():
        if key in changes:
            assert whole[0]["config"][key] == value
    assert whole[0]["accuracy"][-1][0] == whole[0]["steps"]
    assert len(whole[0]["nonprivate/cosine_update"]) == whole[0]["steps"]
    assert "/" not in whole[0]["config"]["data"]["path"]


@pytest.mark.slow
def test_the_best_rate_lies_between_others(studies: dict[str, Any]) -> None:
    """One rate was given, so neighbours were tried until the best had a worse one on either side."""
    found = records(studies["results"], "dp_adam")
    rates = {record["config"]["train"]["learning_rate"]: dict(record["accuracy"])[1] for record in found}
    (chosen,) = (
        record["config"]["train"]["learning_rate"]
        for record in found
        if record["steps"] == record["steps_of_the_schedule"]
    )
    assert rates[chosen] == max(rates.values())
    assert min(rates) < chosen < max(rates)


@pytest.mark.slow
def test_a_second_call_has_nothing_to_do(
    small: list[str], studies: dict[str, Any], run_side_by_side: Callable[..., dict[str, Any]]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in studies["results"].glob("*.json")}
    arguments = {"again": [*small, f"--results={studies['results']}", f"--arms={ARMS[0]}", "--factors=1"]}
    again = run_side_by_side(COMMAND, "--workdir", arguments)["again"]
    assert again.code == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in studies["results"].glob("*.json")} == before
    assert not again.folder.exists()


def test_a_record_has_the_scores_of_dev_or_else_of_what_is_evaluated() -> None:
    assert scored_split(["test", "dev"]) == "dev"
    assert scored_split({"test": {}}) == "test"


def test_the_table_compares_with_the_baseline() -> None:
    def run(rate: float, steps: int, accuracy: list[list[float]]) -> dict[str, Any]:
        cosines = {f"nonprivate/cosine_{x}": [[1, 0.5]] for x in ("noisy", "denoised", "update")}
        config = {"train": {"learning_rate": rate}}
        return {"config": config, "steps": steps, "steps_of_the_schedule": 6, "accuracy": accuracy, **cosines} | {
            "seconds_per_step": [[1, 2.0]]
        }

    runs = [run(0.1, 3, [[3, 0.9]]), run(0.2, 6, [[3, 0.7], [6, 0.8]]), run(0.2, 6, [[3, 0.6], [6, 0.6]])]
    cells = methods_table.row(runs, target=0.65, rate=0.2)
    assert cells == ["0.2 (0.1, 0.2)", "2", "0.700 ± 0.141", "3, never", "0.500, 0.500, 0.500", "2"]
    assert methods_table.row(runs[:1], target=None, rate=0.1)[2] == "not run to the end"


def test_the_rate_of_the_table_is_that_which_the_study_chose() -> None:
    """By what all of its candidates have: a whole run does not win by its later steps."""

    def run(arm: str, epsilon: float, rate: float, seed: int, *accuracy: float) -> dict[str, Any]:
        config = {"privacy": {"expected_batch_size": 64}, "train": {"learning_rate": rate}}
        curve = [[12 * (n + 1), value] for n, value in enumerate(accuracy)]
        return {"arm": arm, "epsilon": epsilon, "seed": seed, "config": config, "accuracy": curve}

    records = [run("a", 8, 0.1, 0, 0.6), run("a", 8, 0.2, 0, 0.7), run("a", 8, 0.2, 1, 0.9), run("a", 3, 0.1, 0, 0.99)]
    others = [run("b", 8, 0.3, 0, 0.5), run("c", 8, 0.1, 0, 0.7), run("c", 8, 0.2, 0, 0.6, 0.9)]
    chosen = {(64, "a"): 0.2, (64, "b"): 0.3, (64, "c"): 0.1}
    assert methods_table.chosen_rates([*records, *others]) == chosen
