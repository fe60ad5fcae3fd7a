"""What options of the guarantee cost, by counting the products of matrices."""

from __future__ import annotations

import pytest

from experiments.benchmarks import privacy_options
from experiments.benchmarks.matrix_flops import matrix_flops


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
