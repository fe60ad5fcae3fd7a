"""What options of the guarantee cost: the products of matrices by counting, and the table of the committed record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import privacy_options
from experiments.benchmarks.matrix_flops import matrix_flops

ROOT = Path(__file__).parents[3]
RECORDS = sorted((ROOT / "experiments/benchmarks/results/privacy_options").glob("*.json"))


@pytest.mark.thorough
def test_users_cost_their_rows_and_the_other_options_no_products() -> None:
    sizes = {"num_layers": 1, "batch_size": 4, "sequence_length": 8}
    counted = {
        name: matrix_flops(privacy_options.traced_step("tiny", options, **sizes)[0].jaxpr)
        for name, options in privacy_options.ARMS.items()
    }
    plain = counted.pop(privacy_options.PLAIN)
    assert {name: round(flops / plain, 1) for name, flops in counted.items()} == {
        "users of 2 rows": 2.0,
        "users of 4 rows": 4.0,
        "quantile": 1.0,
        "chacha20": 1.0,
    }


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_the_readme_has_the_table_of_the_record(record: Path) -> None:
    readme = (ROOT / "experiments/benchmarks/README.md").read_text(encoding="utf-8")
    assert privacy_options.render(json.loads(record.read_text(encoding="utf-8"))) in readme


def test_there_is_a_record() -> None:
    assert RECORDS
