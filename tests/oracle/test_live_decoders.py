"""The decoders against torch transformers: its random models have the same logits and gradients here."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dp_rmt.training.losses import causal_lm_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.oracle, pytest.mark.thorough]

_goldens, _llama = (
    runpy.run_path(str(Path(__file__).with_name(name))) for name in ("write_goldens.py", "llama_folder.py")
)
torch_config, torch_model, padded_batch, torch_logits = (
    _goldens[name] for name in ("torch_config", "torch_model", "padded_batch", "torch_logits")
)
read_llama, params_from_tensors = _llama["read_llama"], _llama["params_from_tensors"]


def llama(folder: Path, **overrides: Any) -> tuple[Any, Any, Any]:
    theirs = torch_model("AutoModelForCausalLM", torch_config("llama", **overrides))
    theirs.save_pretrained(folder)
    return theirs, *read_llama(folder)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True},
        {
            "num_key_value_heads": 4,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ],
    ids=["grouped", "tied", "one_kv_head_with_biases", "all_kv_heads"],
)
def test_logits_at_every_length(overrides: dict[str, Any], left: bool, tmp_path: Path) -> None:
    theirs, module, params = llama(tmp_path, **overrides)
    for length in (1, 7, module.config.max_position_embeddings):
        batch = padded_batch(theirs.config, length, left=left)
        is_token = batch["attention_mask"] == 1
        ours = jax.jit(module.apply)({"params": params}, batch["input_ids"], batch["attention_mask"])
        expected = torch_logits(theirs, batch)
        assert ours.shape == expected.shape
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(np.asarray(ours)[is_token], expected[is_token], atol=1e-4, rtol=0)


def test_gradient_of_the_loss(tmp_path: Path) -> None:
    """One unpadded row, whose loss is transformers' own: the mean over its next tokens."""
    theirs, module, params = llama(tmp_path)
    ids = padded_batch(theirs.config, 9, rows=1)["input_ids"]

    def loss(params: Any) -> jax.Array:
        return causal_lm_loss(module.apply({"params": params}, ids, np.ones_like(ids)), ids, np.ones_like(ids))[0]

    ours, gradient = jax.jit(jax.value_and_grad(loss))(params)
    inputs = torch.tensor(ids).long()
    expected = theirs(input_ids=inputs, labels=inputs).loss
    expected.backward()
    assert float(ours) == pytest.approx(float(expected.detach()), abs=1e-5)
    tensors = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    theirs_here = flatten_dict(params_from_tensors(tensors, module.config.num_layers))
    assert flatten_dict(gradient).keys() == theirs_here.keys()
    for path, leaf in flatten_dict(gradient).items():
        other = theirs_here[path]
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4 * np.abs(other).max(), err_msg=str(path))
