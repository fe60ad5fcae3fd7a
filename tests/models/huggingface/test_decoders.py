"""Decoders of every family against torch transformers, there and back: logits, files, names."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dp_rmt import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.oracle, pytest.mark.thorough]

_tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_decoders.py"))
CONFIGS, LENGTH, padded_batch = (_tiny[name] for name in ("CONFIGS", "LENGTH", "padded_batch"))

every_family = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name the torch model, its folder, and the module and parameters that are loaded from it."""

    @functools.cache
    def make(name: str) -> tuple[Any, Path, Any, Any]:
        config = dict(CONFIGS[name])
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():  # norms and biases too, far from linear
                parameter.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        return theirs, folder, *models.load_pretrained(folder, head="causal_lm")

    return make


def torch_logits(theirs: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return theirs(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()


@functools.cache
def apply(module: Any) -> Any:
    return jax.jit(module.apply)


@every_family
def test_logits_are_those_of_torch_at_once_and_in_pieces(name: str, folders: Any) -> None:
    theirs, _, module, params = folders(name)
    ids, mask = padded_batch()
    expected = torch_logits(theirs, ids, mask)
    assert expected[mask == 1].std() > 0.3
    ours = np.asarray(apply(module)({"params": params}, ids, mask))
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)
    later = ids.copy()
    later[:, 9:] = (later[:, 9:] + 1) % 41
    changed = np.asarray(apply(module)({"params": params}, later, mask))
    np.testing.assert_array_equal(changed[:, :9], ours[:, :9])  # what comes later changes nothing before
    assert (changed[0, 9:] != ours[0, 9:]).any(axis=-1).all()
    cache, pieces = models.init_cache(module.config, len(ids), LENGTH + 2), []
    for start in range(0, LENGTH, 4):
        part = slice(start, start + 4)
        logits, cache = apply(module)({"params": params}, ids[:, part], mask[:, part], cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1)[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


@every_family
def test_a_saved_model_is_the_same_in_transformers_and_here(name: str, folders: Any, tmp_path: Path) -> None:
    theirs, folder, module, params = folders(name)
    models.save_pretrained(tmp_path / "saved", module, params)
    again, params_again = models.load_pretrained(tmp_path / "saved", head="causal_lm")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    ours, original = (load_file(place / "model.safetensors") for place in (tmp_path / "saved", folder))
    assert ours.keys() == original.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], original[tensor], err_msg=tensor)
    reloaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(reloaded) is type(theirs)
    np.testing.assert_array_equal(*(torch_logits(model.eval(), *padded_batch()) for model in (reloaded, theirs)))
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "saved", folder)]
    for key in (configs[1].keys() & configs[0].keys()) - {"rope_parameters", "rope_scaling"}:
        assert configs[1][key] in (None, configs[0][key]), key
    # What follows from other keys, such as yarn's attention_factor from its mscale, is written out.
    rotary = [config.get("rope_parameters") or {} for config in configs]
    for key in rotary[0].keys() & rotary[1].keys():
        assert rotary[1][key] in (None, rotary[0][key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_files_without_the_prefix_and_old_buffers_load_too(name: str, folders: Any, tmp_path: Path) -> None:
    """As the bare model saves itself; the head, which that lacks, is added."""
    theirs, folder, module, params = folders(name)
    tensors = load_file(folder / "model.safetensors")
    prefix = theirs.base_model_prefix + "."
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    buffer = {"llama": "layers.0.self_attn.rotary_emb.inv_freq", "gpt2": "h.0.attn.bias"}
    bare[buffer.get(name, "layers.1.attention.masked_bias")] = np.ones((1, 1), np.float32)
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again, params_again = models.load_pretrained(tmp_path, head="causal_lm")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("name", ["llama_tied_biases", "gpt2"])
def test_shards_of_bfloat16_load(name: str, folders: Any, tmp_path: Path) -> None:
    theirs, _, _, params = folders(name)
    rounded = type(theirs)(theirs.config)
    rounded.load_state_dict(theirs.state_dict())
    rounded.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, loaded = models.load_pretrained(tmp_path, head="causal_lm")

    def check(ours: Any, exact: Any) -> None:
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, np.asarray(exact).astype(jax.numpy.bfloat16).astype(np.float32))

    jax.tree.map(check, loaded, params)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names the shard model-00002.*, which is not there"):
        models.load_pretrained(tmp_path, head="causal_lm")


@pytest.mark.parametrize("length", [5, 12])
def test_longrope_goes_by_the_length_of_the_row(length: int, tmp_path: Path) -> None:
    """Short factors up to 8 tokens, long ones beyond; a row in a batch is what transformers computes of it alone."""
    config = {**CONFIGS["phi3"], "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # far from uniform attention
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    module, params = models.load_pretrained(tmp_path, head="causal_lm")
    ids, _ = padded_batch()
    lengths = np.array([length, 12, 3, 8])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    ours = np.asarray(apply(module)({"params": params}, ids, mask))[0, :length]
    expected = torch_logits(theirs, ids[:1, :length], mask[:1, :length])[0]
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    other = {**config, "rope_scaling": {**config["rope_scaling"], "long_factor": [1.1, 1.7]}}
    differs = models.CausalLanguageModel(models.DecoderConfig.from_hf_config(other))
    changed = np.asarray(apply(differs)({"params": params}, ids, mask))[0, :length]
    assert (np.abs(changed - ours).max() > 1e-3) == (length > 8)


def test_the_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    """A gemma3 folder in both layouts of its names: the same logits, and saved it is a gemma3_text."""
    given = {key: value for key, value in CONFIGS["gemma3_text"].items() if key != "model_type"}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=given, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "new")
    module, params = models.load_pretrained(tmp_path / "new", head="causal_lm")
    assert module.config.is_text_part
    ids, mask = padded_batch()
    expected = torch_logits(theirs, ids[:1], mask[:1])
    np.testing.assert_allclose(apply(module)({"params": params}, ids[:1], mask[:1]), expected, atol=1e-4, rtol=0)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert any("vision_tower" in name for name in tensors)
    old = {"module." + name.replace("model.language_model.", "language_model.model."): x for name, x in tensors.items()}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path / "old", head="causal_lm")[1], params)
    models.save_pretrained(tmp_path / "saved", module, params)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert type(reloaded).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_allclose(torch_logits(reloaded, ids[:1], mask[:1]), expected, atol=1e-5, rtol=0)


def test_the_sizes_that_a_gemma3_config_leaves_out_are_those_of_transformers() -> None:
    ours = models.DecoderConfig.from_hf_config({"model_type": "gemma3", "text_config": {}})
    theirs = models.DecoderConfig.from_hf_config(json.loads(transformers.Gemma3TextConfig().to_json_string()))
    ignored = {"is_text_part": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    assert dataclasses.replace(ours, **ignored, sliding_layers=theirs.sliding_layers) == theirs
