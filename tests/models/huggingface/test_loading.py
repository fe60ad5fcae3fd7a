"""Loading Hugging Face folders: every spelling and head, and errors that say what to do."""

from __future__ import annotations

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

GOLDENS = Path(__file__).parents[1] / "goldens"
FOLDERS = {
    "bert_classifier": "classification",
    "roberta_classifier": "classification",
    "bert_mlm": "masked_lm",
    "roberta_mlm": "masked_lm",
}
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
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # which refuses trees of other keys


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
        ("roberta_classifier", "masked_lm", ["mlm_head"], "classifier.out_proj.weight"),
    ],
)
def test_an_absent_head_is_initialised_from_the_key_and_said(
    name: str, head: str, fresh: list[str], ignored: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "absl"):
        module, params = load(GOLDENS / name, head, seed=1)
    assert "initialised from the key" in caplog.text
    assert "ignored tensors of heads" in caplog.text
    assert ignored in caplog.text
    expected = models.init_params(module, jax.random.key(1))
    assert_equal_trees({part: params[part] for part in fresh}, {part: expected[part] for part in fresh})
    assert module.fresh == tuple(sorted(fresh))
    assert load(GOLDENS / name, FOLDERS[name])[0].fresh == ()
    assert_equal_trees(params["encoder"], load(GOLDENS / name, FOLDERS[name])[1]["encoder"])


def test_bert_s_pooler_is_kept_when_only_the_classifier_is_absent(changed: Callable[..., Path]) -> None:
    folder = changed("bert_classifier", lambda t: (t.pop("classifier.weight"), t.pop("classifier.bias")))
    _, params = load(folder, num_labels=5)
    assert_equal_trees(params["pooler"], load(GOLDENS / "bert_classifier")[1]["pooler"])
    assert params["classifier"]["kernel"].shape == (32, 5)
    assert not params["classifier"]["bias"].any()


def test_a_token_classifier_is_not_taken_for_a_sequence_classifier(changed: Callable[..., Path]) -> None:
    """The tensor names are the same; only config.json tells."""
    folder = changed("bert_classifier", architectures=["BertForTokenClassification"])
    _, params = load(folder)
    assert load(GOLDENS / "bert_classifier")[1]["classifier"]["bias"].all()
    assert not params["classifier"]["bias"].any()


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
    with pytest.raises(
        ValueError, match=rf"{decoder}\.decoder\.weight differs from .*; if they are not, write .tie_word"
    ):
        load(folder, "masked_lm")


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(QUERY),
            r"model\.safetensors has no tensor encoder\.layer\.1\.attention\.self\.query\.weight "
            r"of shape \(32, 32\), which config\.json calls for; check that",
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
    message = r"classifier.* has shape \(3, 32\), expected \(4, 32\); .* pass num_labels=3 .* or load the"
    with pytest.raises(ValueError, match=message):
        load(GOLDENS / name, num_labels=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"config\.json: model_type 'gpt2' .* not supported; supported: bert, roberta",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' .* use a model with",
        ),
        ({"is_decoder": True}, "is_decoder=True .* not supported"),
        ({"hidden_act": "mish"}, r"config\.json: hidden_act 'mish' is not supported"),
    ],
)
def test_unsupported_models_are_named(config: dict[str, Any], message: str, changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(changed("bert_classifier", **config))


NLI = {"id2label": {"0": "CONTRADICTION", "1": "Neutral", "2": "entailment"}}
WANTED = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier"])
def test_the_logits_of_a_trained_classifier_are_put_into_the_order_of_the_names(
    name: str, changed: Callable[..., Path], tmp_path: Path
) -> None:
    """There and back: what is loaded, and the folder that is saved, whose names and logits belong together."""
    folder = changed(name, **NLI)
    module, params = models.load_pretrained(folder, num_labels=3, label_names=WANTED)
    _, expected = load(folder)
    assert module.label_rows == (2, 1, 0)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(params["classifier"][leaf], expected["classifier"][leaf][..., ::-1])
    assert_equal_trees(params["encoder"], expected["encoder"])
    models.save_pretrained(tmp_path / "saved", module, params, label_names=WANTED)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["id2label"]["0"] == "entailment"
    again, same = models.load_pretrained(tmp_path / "saved", num_labels=3, label_names=WANTED)
    assert_equal_trees(same, params)
    assert again.label_rows == ()


def test_labels_of_other_names_are_refused_and_of_no_names_taken_as_they_are(
    changed: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed("bert_classifier", **NLI)
    message = (
        r"config\.json: id2label names the labels CONTRADICTION, Neutral, entailment, but those of the data are bad,"
    )
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(folder, num_labels=3, label_names=("bad", "neutral", "good"))
    with pytest.raises(ValueError, match="must name the 3 logits of a classification head"):
        models.load_pretrained(folder, num_labels=3, label_names=("bad", "good"))
    config = json.loads((folder / "config.json").read_text())
    for id2label in (None, {str(number): f"LABEL_{number}" for number in range(3)}):
        (folder / "config.json").write_text(json.dumps({**config, "id2label": id2label}))
        with caplog.at_level(logging.WARNING, "absl"):
            _, params = models.load_pretrained(folder, num_labels=3, label_names=WANTED)
        assert "no names (id2label): they are taken to be entailment, neutral, contradiction, in this" in caplog.text
        assert_equal_trees(params, load(folder)[1])
        caplog.clear()


def test_a_fresh_classifier_has_no_names_to_go_by(changed: Callable[..., Path]) -> None:
    folder = changed("bert_mlm", **NLI)
    module, _ = models.load_pretrained(folder, num_labels=2, label_names=("bad", "good"), key=jax.random.key(0))
    assert module.fresh == ("classifier", "pooler")
    assert module.label_rows == ()
