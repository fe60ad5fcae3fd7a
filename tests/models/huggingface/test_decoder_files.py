"""Folders of decoders: errors that name file and tensor, vocabularies, memory while loading."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dp_rmt import models

_tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_decoders.py"))
build = _tiny["build"]
Tensors = dict[str, np.ndarray]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A saved tiny decoder with its tensors or its config changed."""

    def change(name: str, tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
        models.save_pretrained(tmp_path / name, *build(name))
        if tensors is not None:
            content = load_file(tmp_path / name / "model.safetensors")
            tensors(content)
            save_file(content, tmp_path / name / "model.safetensors")
        content = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**content, **config}))
        return tmp_path / name

    return change


def load(folder: Path) -> Any:
    return models.load_pretrained(folder, head="causal_lm")


UP = "model.layers.1.mlp.up_proj.weight"
FUSED = "gpt_neox.layers.2.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("name", "tensors", "config", "message"),
    [
        ("llama", None, {"model_type": "opt"}, r"config\.json: model_type 'opt' is not a supported family"),
        (
            "llama",
            lambda t: t.pop(UP),
            {},
            r"model\.safetensors has no tensor layers\.1\.mlp\.up_proj\.weight of shape \(28, 18\), which config\.json",
        ),
        (
            "llama",
            lambda t: t.pop("lm_head.weight"),
            {},
            r"has no tensor lm_head\.weight of shape \(41, 18\)",
        ),
        (
            "gpt_neox",
            lambda t: t.update({FUSED: t[FUSED][:-1].copy()}),
            {},
            r"model\.safetensors: tensor gpt_neox\.layers\.2\.attention\.query_key_value\.weight has shape \(71, 24\), "
            r"expected \(72, 24\)",
        ),
        (
            "qwen3",
            lambda t: t.update({"model.layers.0.mlp.router.weight": np.ones((2, 3), np.float32)}),
            {},
            r"has 1 tensor\(s\) that the model .* lacks, the first is model\.layers\.0\.mlp\.router\.weight of shape",
        ),
        ("qwen3", None, {"num_hidden_layers": 2}, r"the first is model\.layers\.2\..*Check num_hidden_layers"),
        (
            "gemma2",
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            {},
            r"lm_head\.weight differs from model\.embed_tokens\.weight",
        ),
        (
            "mistral",
            lambda t: t.update({UP: t[UP].astype(np.int8)}),
            {},
            r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight holds I8 numbers, expected one of F64",
        ),
        ("mistral", lambda t: t.update({UP[6:]: t[UP].copy()}), {}, r"holds layers\.1\.mlp\.up_proj\.weight twice"),
    ],
    ids=["family", "missing", "no head", "misshapen", "unknown", "layers", "untied", "quantised", "twice"],
)
def test_bad_folders_are_named(
    name: str, tensors: Any, config: dict[str, Any], message: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        load(changed(name, tensors, **config))


def test_a_tied_copy_in_the_file_is_no_leaf(changed: Callable[..., Path]) -> None:
    folder = changed("gemma2", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], build("gemma2")[1])


def test_a_broken_index_is_named(changed: Callable[..., Path]) -> None:
    folder = changed("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards \(KeyError: 'weight_map'\)"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/../../secret.safetensors", "{absolute}", "..", ".", "", "a//b", "..\\x", "C:x", 3],
)
def test_a_shard_outside_the_folder_is_refused(name: Any, changed: Callable[..., Path]) -> None:
    """The file is there, whole, with the right tensors: it is its name that is refused."""
    folder = changed("llama")
    secret = (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    name = str(secret) if name == "{absolute}" else name
    (folder / "a").mkdir()
    weight_map = dict.fromkeys(load_file(secret), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json names the file .*, which is no file of its folder"):
        load(folder)


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(changed: Callable[..., Path], tmp_path: Path) -> None:
    """snapshots/COMMIT/FILE is a link to ../../blobs/DIGEST; shards may also lie in a folder of their own."""
    folder, snapshot, blobs = changed("llama"), tmp_path / "hub" / "snapshots" / "0a1b", tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    (snapshot / "shards").mkdir(parents=True)
    expected = load(folder)[1]
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "shards/model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        link = snapshot / ("shards/model-00001.safetensors" if source == "model.safetensors" else source)
        (folder / source).rename(blobs / f"digest-of-{source}")
        link.symlink_to(os.path.relpath(blobs / f"digest-of-{source}", link.parent))
    jax.tree.map(np.testing.assert_array_equal, load(snapshot)[1], expected)


def test_a_tensor_in_two_shards_is_named(changed: Callable[..., Path]) -> None:
    folder = changed("llama")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({UP: np.zeros((28, 18), np.float32)}, folder / "b.safetensors")
    weight_map = {UP: "a.safetensors", "other": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"up_proj\.weight is in .*a\.safetensors and in .*b\.safetensors; download"):
        load(folder)


def test_low_rank_updates_have_no_place_in_a_folder(tmp_path: Path) -> None:
    module, params = build("llama", lora=models.LoRAConfig(2, 2.0, ("query",)))
    with pytest.raises(ValueError, match=r"merge them into its weights first: without_lora\(module, params\)"):
        models.save_pretrained(tmp_path / "model", module, params)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {"<unk>": 0, "good": 1, "film": 41}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert models.load_tokenizer(tmp_path, vocab_size=42).get_vocab()["film"] == 41
    with pytest.raises(ValueError, match="has the token 'film' with id 41, but the model's word embedding has 41 rows"):
        models.load_tokenizer(tmp_path, vocab_size=41)


_MEASURE = """
import sys
import jax
from dp_rmt import models

def peak():  # not ru_maxrss, which begins with that of the parent
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

small, large = sys.argv[1:]
models.load_pretrained(small, head="causal_lm")  # what tracing takes is there now
before = peak()
module, params = models.load_pretrained(large, head="causal_lm")
jax.block_until_ready(params)
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_loading_takes_the_memory_of_the_model(tmp_path: Path) -> None:
    """Half of it is the word embedding, the hardest case for copies; what is read is an eighth at a time."""
    config = models.DecoderConfig(16384, 512, 4, 8, 4, 64, 1024, 64, tie_word_embeddings=True)
    module = models.CausalLanguageModel(config)
    shapes = jax.eval_shape(lambda key: models.init_params(module, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    models.save_pretrained(tmp_path / "large", module, params)
    models.save_pretrained(tmp_path / "small", *build("llama"))
    ratio = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert 0.9 < float(ratio) < 1.5
