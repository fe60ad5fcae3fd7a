"""Meshes and sharding rules: every parameter of every model is covered, and what does not fit is said."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dp_rmt.baselines.filters import kalman_filter, low_pass_filter
from dp_rmt.baselines.iterates import average_iterates
from dp_rmt.clipping.coordinates import AxisMap, Coordinates, LeafAxes
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.geometry import whiten_inputs
from dp_rmt.models import (
    CausalLanguageModel,
    DecoderConfig,
    EncoderConfig,
    LoRAConfig,
    MaskedLanguageModel,
    SequenceClassifier,
    init_params,
)
from dp_rmt.models.decoder.config import PROJECTIONS
from dp_rmt.models.encoder import ENCODER_PROJECTIONS
from dp_rmt.noise_addition import add_gaussian_noise, noise_key
from dp_rmt.training.partitioning import AXES, batch_parts, by_example, by_matrix, data_mesh, make_mesh, place
from dp_rmt.training.sharding_rules import SHARDING_RULES, leaf_sharding, state_shardings
from dp_rmt.training.train_state import TrainState, Transforms
from dp_rmt.trees import leaves_by_path, split_params

MESH = AbstractMesh((2, 2, 2), AXES)
ENCODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
DECODER = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "rope_theta": 50.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": True,
}
# Every kind of leaf that a model can have.
MODELS = {
    "classifier": SequenceClassifier(
        EncoderConfig("bert", **ENCODER, lora=LoRAConfig(2, 4.0, ENCODER_PROJECTIONS)), num_labels=3
    ),
    "masked_lm": MaskedLanguageModel(EncoderConfig("roberta", **ENCODER)),
    "decoder": CausalLanguageModel(
        DecoderConfig(
            **DECODER,
            tie_word_embeddings=False,
            qk_norm=True,
            sandwich_norms=True,
            lora=LoRAConfig(2, 4.0, PROJECTIONS),
        )
    ),
    "gpt2": CausalLanguageModel(
        DecoderConfig(
            **DECODER,
            tie_word_embeddings=True,
            gated=False,
            learned_positions=True,
            norm="layer_norm",
            architecture="gpt2",
        )
    ),
}


def shapes(name):
    return jax.eval_shape(lambda key: init_params(MODELS[name], key), jax.random.key(0))


def spec(path, shape, mesh=MESH, **options):
    return tuple(leaf_sharding(path, shape, mesh, **options).spec)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_every_model_has_a_rule(name):
    """And every matrix is divided by four, unless it has an odd side; a new kind of leaf fails here."""
    for path, leaf in leaves_by_path(shapes(name)):
        parts = np.prod([MESH.shape[axis] for axis in spec(path, leaf.shape) if axis is not None], dtype=int)
        if path.endswith(("kernel", "embedding")) and "lora" not in path and path != "classifier/kernel":
            assert parts == (2 if any(size % 2 for size in leaf.shape[-2:]) else 4), path


def test_rules_are_of_the_last_axes():
    assert spec("decoder/layers/attention/query/kernel", (3, 16, 16)) == (None, "fsdp", "tensor")
    assert spec("decoder/layers/down/kernel", (3, 24, 16)) == (None, "tensor", "fsdp")
    assert spec("decoder/layers/down_lora/lora_b/kernel", (3, 2, 16)) == (None, None, "fsdp")
    assert spec("lm_head/kernel", (16, 32)) == ("fsdp", "tensor")


def test_the_first_rule_that_matches_counts():
    rules = [("a/kernel", PartitionSpec("data")), ("kernel", PartitionSpec("fsdp"))]
    assert spec("a/kernel", (4,), rules=rules) == ("data",)
    assert spec("b/kernel", (4,), rules=rules) == ("fsdp",)
    assert spec("b/kernel", (8,), rules=[("b", PartitionSpec(("data", "fsdp")))]) == (("data", "fsdp"),)


def test_what_does_not_fit_is_not_divided():
    assert spec("encoder/embeddings/word_embeddings/embedding", (31, 16)) == (None, "fsdp")
    assert spec("encoder/embeddings/word_embeddings/embedding", (32, 15)) == ("tensor", None)
    assert spec("b/kernel", (6,), rules=[("b", PartitionSpec(("data", "fsdp")))]) == (None,)


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no sharding rule covers the parameter encoder/new/kernel \(2, 4\)"):
        leaf_sharding("encoder/new/kernel", (2, 4), MESH)
    with pytest.raises(ValueError, match=r"rule of query/kernel has 2 axes .* the parameter 1"):
        leaf_sharding("query/kernel", (4,), MESH)
    frozen = {"adapter": {"kernel": jnp.zeros((4, 4))}}
    state = TrainState.create(Transforms(*[optax.identity()] * 3), {"lm_head": {"kernel": jnp.zeros((4, 4))}}, frozen)
    with pytest.raises(ValueError, match="adapter/kernel"):
        state_shardings(state, MESH)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1),
        optax.chain(low_pass_filter(), optax.sgd(0.1, momentum=0.9)),
        kalman_filter(optax.adam(0.1)),
        optax.chain(optax.sgd(0.1), average_iterates(0.9)),
    ],
    ids=["adamw", "low_pass", "kalman", "average"],
)
def test_what_is_kept_of_a_parameter_lies_like_it(optimizer):
    """All leaves of a parameter's shape; steps, keys and the denoiser's own state are on every device."""
    params, frozen = split_params(shapes("classifier"), "layers/(intermediate|output)/|pooler")
    transforms = Transforms(add_gaussian_noise(0.1, noise_key(0)), denoise_matrices(0.1, svd="subspace"), optimizer)
    state = jax.eval_shape(lambda p, f: TrainState.create(transforms, p, f), params, frozen)
    shardings = state_shardings(state, MESH)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    by_path, kept = dict(leaves_by_path(shardings.params)), 0
    for (path, sharding), leaf in zip(leaves_by_path(shardings), jax.tree.leaves(state), strict=True):
        owner = [name for name in by_path if path.endswith(f"/{name}")]
        if path.startswith(("params/", "frozen/")):
            assert sharding == leaf_sharding(path.split("/", 1)[1], leaf.shape, MESH)
        elif owner and path.startswith("optimizer/"):
            assert sharding == by_path[owner[0]]
            kept += 1
        else:
            assert tuple(sharding.spec) == (), path
    assert kept >= len(by_path)


def test_a_leaf_with_the_path_but_not_the_shape_is_copied():
    """Such as a factored second moment."""
    params = {"pooler": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    keep_sums = optax.GradientTransformation(lambda p: jax.tree.map(lambda x: x.sum(0), p), None)
    state = TrainState.create(Transforms(optax.identity(), optax.identity(), keep_sums), params, {})
    optimizer = state_shardings(state, MESH).optimizer
    assert [tuple(leaf.spec) for leaf in jax.tree.leaves(optimizer)] == [(), ()]


def test_the_mesh_takes_what_is_left():
    devices = jax.devices()[:1]
    assert dict(make_mesh(devices=devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(1, -1, 1, devices=devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert data_mesh(devices) == make_mesh(1, 1, 1, devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 1, 1), "data=2, fsdp=1, tensor=1 does not fit 1 devices"),
        ((-1, 2, 1), "does not fit 1 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "at least 1"),
        ((1, -2, 1), "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes, jax.devices()[:1])


def test_what_is_divided_over_which_axes():
    mesh = AbstractMesh((3, 2, 5), AXES)
    assert tuple(by_example(mesh).spec) == (("data", "fsdp"),)
    assert tuple(by_matrix(mesh).spec) == (AXES,)
    assert batch_parts(mesh) == 6


def test_what_is_placed_is_a_copy():
    """A step donates its state; on the CPU that would be the caller's memory."""
    mesh, ours = data_mesh(jax.devices()[:1]), np.arange(1024.0, dtype=np.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for layout in (mesh, {"x": NamedSharding(mesh, PartitionSpec())}):
        jax.block_until_ready(add(place({"x": ours}, layout)["x"]))
    np.testing.assert_array_equal(ours, np.arange(1024.0))


def test_no_rule_is_idle():
    paths = [path for name in MODELS for path, _ in leaves_by_path(shapes(name))]
    for number, (pattern, _) in enumerate(SHARDING_RULES):
        earlier = [other for other, _ in SHARDING_RULES[:number]]
        assert any(re.search(pattern, p) and not any(re.search(e, p) for e in earlier) for p in paths), pattern


def test_the_maps_of_whitened_coordinates_are_divided_by_their_inputs():
    params = {"pooler": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    axis_map = AxisMap(jnp.ones(()), jnp.zeros((8, 3)))
    coordinates = Coordinates({"x": axis_map}, (LeafAxes("pooler/kernel", (-2,), (-1,), "x"),))
    optimizer = optax.chain(optax.sgd(0.1), whiten_inputs(coordinates))
    state = TrainState.create(Transforms(optax.identity(), optax.identity(), optimizer), params, {})
    specs = {path: tuple(leaf.spec) for path, leaf in leaves_by_path(state_shardings(state, MESH).optimizer)}
    assert {path: spec for path, spec in specs.items() if "maps" in path} == {
        "1/coordinates/maps/x/scale": (),
        "1/coordinates/maps/x/basis": ("fsdp", None),
    }
