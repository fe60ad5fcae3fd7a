"""The cost model against compiled programs: operations and bytes of a step, read in HLO text; nothing is run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from dp_rmt.models import CausalLanguageModel, init_params
from experiments.benchmarks.scaling import (
    cost_model as scaling_model,
)
from experiments.benchmarks.scaling import (
    main as scaling,
)
from experiments.benchmarks.scaling import (
    memory as scaling_memory,
)
from experiments.benchmarks.scaling import (
    programs as scaling_programs,
)
from experiments.benchmarks.scaling.cost_model import Layout
from experiments.benchmarks.scaling.hardware import CHIPS, MODELS, Decoder
from experiments.benchmarks.scaling.hlo import Cost, cost_of

ROOT = Path(experiments.__file__).parents[1]
RESULTS = ROOT / "experiments" / "benchmarks" / "results" / "scaling"
RECORDS = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*x*x*.json"))]


def hlo(function: Any, *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_loops_and_branches_are_counted_as_often_as_they_run() -> None:
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def nested(x: jax.Array) -> jax.Array:
        def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda d, _: (jnp.tanh(d @ c), None), c, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=4)[0]

    assert cost_of(hlo(nested, x)).matrix_flops == 12 * product
    batched = cost_of(hlo(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((5, 8, 4)), jnp.ones((5, 4, 2))))
    assert batched.matrix_flops == 5 * 2 * 8 * 4 * 2

    def rarely(x: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.isnan(x).any(), lambda x: x @ x @ x, lambda x: x @ x, x)

    assert cost_of(hlo(rarely, x)).matrix_flops == product
    until = cost_of(hlo(lambda x: jax.lax.while_loop(lambda c: c.sum() < 1e9, lambda c: c @ c, x), x))
    assert (until.matrix_flops, until.unknown_loops) == (product, 1)


@pytest.mark.parametrize(
    ("line", "key", "payload", "sent"),
    [
        ("%r = f32[8,4]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}", ("all-gather", 4), 128, 96),
        ("%r = f32[2,4]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%s", ("all-reduce", 2), 32, 32),
        ("%r = f32[1,4]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8]", ("reduce-scatter", 2), 32, 16),
        ("%r = f32[2,4]{1,0} all-to-all(%p), replica_groups=mesh['a'=8] {'a':(2)4}", ("all-to-all", 4), 32, 24),
        ("%r = f32[2,4]{1,0} collective-permute(%p), source_target_pairs={{0,1}}", ("collective-permute", 2), 32, 32),
        (
            "%r = (f32[2,4]{1,0}, f32[4,4]{1,0}) all-gather-start(%p), replica_groups=[1,2]<=[2]",
            ("all-gather", 2),
            64,
            32,
        ),
    ],
)
def test_collectives_have_their_groups_and_bytes(line: str, key: tuple[str, int], payload: int, sent: float) -> None:
    text = f"ENTRY %main (p: f32[2,4]) -> f32[2,4] {{\n  %p = f32[2,4]{{1,0}} parameter(0)\n  {line}\n}}\n"
    cost = cost_of(text)
    assert dict(cost.payload) == {key: payload}
    assert cost.sent == pytest.approx(sent)
    assert (cost + cost.times(2)).payload[key] == 3 * payload


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        cost_of("HloModule nothing")
    with pytest.raises(ValueError, match="no replica_groups in all-gather"):
        cost_of("ENTRY %m (p: f32[2]) -> f32[2] {\n  %p = f32[2]{0} parameter(0)\n  %r = f32[4]{0} all-gather(%p)\n}\n")


def test_a_normal_number_takes_as_many_operations_as_the_model_says() -> None:
    count = 4096
    cost = cost_of(hlo(lambda key: jax.random.normal(key, (count,)), jax.random.key(0)))
    assert cost.unknown_loops == 0
    assert cost.vector_ops / count == pytest.approx(scaling_model.NOISE_OPERATIONS, rel=0.1)


def test_the_small_model_is_the_one_that_is_compiled() -> None:
    config = scaling_programs.CONFIG
    model = Decoder(
        config.hidden_size,
        config.num_layers,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.intermediate_size,
        config.vocab_size,
    )
    assert model == scaling.SMALL
    problem = scaling_programs.PROBLEMS["small"]
    assert (problem.tokens, problem.examples_per_part) == (scaling.TOKENS, scaling.EXAMPLES_PER_PART)
    shapes = jax.eval_shape(lambda: init_params(CausalLanguageModel(config), jax.random.key(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
    scales = (2 * config.num_layers + 1) * config.hidden_size
    assert sum(sizes) == model.parameters + scales


@pytest.mark.slow
def test_one_device_does_the_counted_products() -> None:
    """Here, where there is one device: the whole step, exactly but for the norms' scales."""
    if jax.device_count() != 1:
        pytest.skip(f"counts for one device, this process has {jax.device_count()}")
    mesh = scaling_programs.make_mesh()
    plain, noisy = (cost_of(scaling_programs.compiled_step(mesh, name).as_text()) for name in ("plain", "noisy"))
    assert plain.matrix_flops == scaling.counted(1, 1, private=False)["matrix_flops"]
    assert noisy.matrix_flops == pytest.approx(scaling.counted(1, 1)["matrix_flops"], rel=1e-4)
    assert plain.sent == noisy.sent == 0


@pytest.mark.slow
def test_eight_devices_send_the_counted_bytes() -> None:
    record = scaling.compiled(2, 4, 1, "noisy")
    model = scaling.counted(2, 4)
    assert record["matrix_flops"] == pytest.approx(model["matrix_flops"], rel=1e-4)
    assert record["sent_bytes"] == pytest.approx(model["sent_bytes"], rel=0.01)


@pytest.mark.slow
def test_a_private_step_needs_little_more_memory_than_a_plain_one() -> None:
    """Of a decoder with the structure of the 4B one. With gradient and noise whole on every device: four times."""
    plain, *private = (
        scaling.compiled(1, 8, 1, variant, "shrunken")
        for variant in ("plain_remat", "denoised_remat", "denoised_remat_ghost")
    )
    for record in private:
        assert record["temp_bytes"] + record["argument_bytes"] < 1.3 * (plain["temp_bytes"] + plain["argument_bytes"])


def test_a_4b_decoder_fits_where_it_does_without_privacy() -> None:
    """From the records, also with ghost clipping, which takes up to a ninth more."""
    table = {path.stem: json.loads(path.read_text()) for path in scaling_memory.record_files(RESULTS)}
    for devices in scaling_memory.DEVICES:
        plain, private, ghost = (table[f"qwen3_4b-{devices}-{name}"] for name in scaling_memory.VARIANTS)
        assert private["needed_bytes"] < 1.05 * plain["needed_bytes"]
        assert ghost["needed_bytes"] < 1.12 * plain["needed_bytes"]
        for chip in CHIPS.values():
            if plain["needed_bytes"] <= chip.hbm_bytes:
                assert max(private["needed_bytes"], ghost["needed_bytes"]) <= chip.hbm_bytes


def of(variant: str, *, tensor: bool = False) -> list[dict[str, Any]]:
    return [r for r in RECORDS if r["variant"] == variant and (r["mesh"]["tensor"] > 1) == tensor]


@pytest.mark.parametrize("variant", ["plain", "noisy", "denoised"])
def test_the_records_agree_with_the_model_on_8_64_and_256_devices(variant: str) -> None:
    """Where there are copies, the denoiser's bytes are not counted, nor are its small products anywhere.

    Nor what `output` and `down` exchange once more, being divided by their outputs: 3% of all on 8 devices.
    """
    records = of(variant)
    assert {record["devices"] for record in records} == {8, 64, 256}
    for record in records:
        denoised, data = variant == "denoised", record["mesh"]["data"]
        model = scaling.counted(data, record["mesh"]["fsdp"], private=variant != "plain", denoised=denoised)
        if not denoised:
            assert record["matrix_flops"] == pytest.approx(model["matrix_flops"], rel=1e-4)
        if not denoised or data == 1:
            assert record["sent_bytes"] == pytest.approx(model["sent_bytes"], rel=0.04 if denoised else 0.02)
        assert record["unknown_loops"] == 0


@pytest.mark.parametrize("variant", ["plain", "noisy", "denoised"])
def test_meshes_with_tensor_scale_too(variant: str) -> None:
    """Products of a device are the same on 8, 64 and 256; what it sends approaches a limit, like (N - 1) / N."""
    for data in (False, True):
        records = {r["devices"]: r for r in of(variant, tensor=True) if (r["mesh"]["data"] > 1) == data}
        assert set(records) == {8, 64, 256}
        assert len({record["matrix_flops"] for record in records.values()}) == 1
        assert records[256]["sent_bytes"] < 1.1 * records[64]["sent_bytes"]


def test_the_records_of_recomputed_layers_agree_too() -> None:
    for variant, private in (("plain_remat", False), ("noisy_remat", True)):
        (record,) = of(variant)
        model = scaling.counted(1, 8, private=private, remat=True)
        assert record["matrix_flops"] == pytest.approx(model["matrix_flops"], rel=1e-4)
        assert record["sent_bytes"] == pytest.approx(model["sent_bytes"], rel=0.02)


def test_more_devices_do_not_give_a_device_more_products() -> None:
    for tensor in (False, True):
        assert len({record["matrix_flops"] for record in of("noisy", tensor=tensor)}) == 1


def test_what_divides_the_parameters_divides_the_state() -> None:
    by_parts = {record["mesh"]["fsdp"]: record["argument_bytes"] for record in of("noisy")}
    small = scaling.SMALL.parameters
    for parts, size in by_parts.items():
        assert size == pytest.approx(3 * 4 * small / parts, rel=0.2)  # parameters and two moments


def test_the_page_has_the_tables_of_the_records() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    of_memory = [json.loads(path.read_text()) for path in scaling_memory.record_files(RESULTS)]
    tables = (scaling.compiled_table(RECORDS), scaling.seconds_table()[0], scaling_memory.memory_table(of_memory))
    for table in tables:
        for line in table.splitlines():
            assert line in page, line
    for chip in CHIPS.values():
        for address in re.findall(r"https://\S+?(?=[:,; ]|$)", chip.sources):
            assert address in page


def test_counts_of_known_models() -> None:
    eight = MODELS["Llama-3 8B"]
    assert eight.parameters == pytest.approx(8.03e9, rel=1e-3)  # the model card
    tokens = 1000
    matrices = eight.parameters - eight.hidden * eight.vocab
    assert scaling_model.plain_flops(eight, tokens, 0) == 6 * matrices * tokens
    layout = Layout(1, 1, 1, 512, 1, gathered=2)
    assert scaling_model.gather_bytes(eight, layout) == pytest.approx(2 * 2 * matrices, rel=0.05)
    assert scaling_model.state_bytes(eight, layout) == 16 * eight.parameters
    # Ghost norms take T (I + O) of what a weighted sum takes, I O: an eighth at T = 512 and 8192 x 8192.
    share = scaling_model.norm_flops(eight, tokens, 512) / scaling_model.plain_flops(eight, tokens, 512)
    assert 0.03 < share < 0.1


def test_no_part_of_a_step_is_above_its_peak() -> None:
    for model in MODELS.values():
        for chip in CHIPS.values():
            layout = scaling_model.fastest_layout(model, chip, 256, 1024, 512)
            if layout is None:
                continue
            seconds = scaling_model.step_seconds(model, chip, layout)
            tokens = layout.examples * layout.length
            flops = scaling_model.plain_flops(model, tokens, layout.length)
            flops += layout.remat * scaling_model.remat_flops(model, tokens, layout.length, private=True)
            assert flops / (seconds["products"] * layout.devices) == pytest.approx(chip.flops)
            assert seconds["total"] >= seconds["plain"] > 0
            faster = dataclasses.replace(chip, link=2 * chip.link, link_out=2 * chip.link_out)
            assert scaling_model.step_seconds(model, faster, layout)["network"] == pytest.approx(seconds["network"] / 2)


def test_costs_add_up() -> None:
    one = Cost(2.0, 3.0)
    assert (one + one.times(2)).matrix_flops == 6.0
    assert np.isclose((one + one.times(2)).vector_ops, 9.0)
