"""One table between Flax parameter paths and Hugging Face tensor names, used for loading and for saving."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier

Model = SequenceClassifier | MaskedLanguageModel

# Parts of a layer kind: Flax leaf, Hugging Face suffix, whether one is the transpose of the other
# (torch.nn.Linear stores (out, in), Flax (in, out)).
_LEAVES: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "dense": (("kernel", "weight", True), ("bias", "bias", False)),
    "layer_norm": (("scale", "weight", False), ("bias", "bias", False)),
    "embedding": (("embedding", "weight", False),),
    "bias": (("bias", "bias", False),),
}

_Modules = tuple[tuple[str, str, str], ...]  # (Flax path, Hugging Face module, kind)

_ENCODER: _Modules = (
    ("encoder/embeddings/word_embeddings", "embeddings.word_embeddings", "embedding"),
    ("encoder/embeddings/position_embeddings", "embeddings.position_embeddings", "embedding"),
    ("encoder/embeddings/token_type_embeddings", "embeddings.token_type_embeddings", "embedding"),
    ("encoder/embeddings/layer_norm", "embeddings.LayerNorm", "layer_norm"),
    ("encoder/layers/attention/query", "encoder.layer.{layer}.attention.self.query", "dense"),
    ("encoder/layers/attention/key", "encoder.layer.{layer}.attention.self.key", "dense"),
    ("encoder/layers/attention/value", "encoder.layer.{layer}.attention.self.value", "dense"),
    ("encoder/layers/attention/output", "encoder.layer.{layer}.attention.output.dense", "dense"),
    ("encoder/layers/attention_layer_norm", "encoder.layer.{layer}.attention.output.LayerNorm", "layer_norm"),
    ("encoder/layers/intermediate", "encoder.layer.{layer}.intermediate.dense", "dense"),
    ("encoder/layers/output", "encoder.layer.{layer}.output.dense", "dense"),
    ("encoder/layers/output_layer_norm", "encoder.layer.{layer}.output.LayerNorm", "layer_norm"),
)
# Groups of a head: a group is loaded as a whole or, if absent, initialised as a whole.
_HEADS: dict[tuple[str, str], dict[str, _Modules]] = {
    ("bert", "classification"): {
        "pooler": (("pooler", "pooler.dense", "dense"),),
        "classifier": (("classifier", "classifier", "dense"),),
    },
    ("roberta", "classification"): {
        "classification head": (
            ("pooler", "classifier.dense", "dense"),
            ("classifier", "classifier.out_proj", "dense"),
        ),
    },
    ("bert", "masked_lm"): {
        "masked language model head": (
            ("mlm_head/dense", "cls.predictions.transform.dense", "dense"),
            ("mlm_head/layer_norm", "cls.predictions.transform.LayerNorm", "layer_norm"),
            ("mlm_head", "cls.predictions", "bias"),
        ),
    },
    ("roberta", "masked_lm"): {
        "masked language model head": (
            ("mlm_head/dense", "lm_head.dense", "dense"),
            ("mlm_head/layer_norm", "lm_head.layer_norm", "layer_norm"),
            ("mlm_head", "lm_head", "bias"),
        ),
    },
}
_BACKBONE_PARTS = ("embeddings.", "encoder.", "pooler.")
HEAD_PARTS = ("pooler.", "classifier.", "cls.", "lm_head.", "qa_outputs.")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Copies of tied weights that some checkpoints carry: copy -> original, by architecture.
TIED_COPIES = {
    "bert": {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}
_HF_CLASSES = {
    ("bert", "classification"): "BertForSequenceClassification",
    ("roberta", "classification"): "RobertaForSequenceClassification",
    ("bert", "masked_lm"): "BertForMaskedLM",
    ("roberta", "masked_lm"): "RobertaForMaskedLM",
}


@dataclasses.dataclass(frozen=True)
class LeafName:
    """One Flax leaf and the Hugging Face tensors that hold it.

    Attributes:
        path: keys into the nested parameter dict.
        shape: shape of the leaf.
        hf_names: the tensor of each layer if stacked, else the one tensor; without the `bert.` prefix.
        stacked: whether the leaf's first axis is the layer.
        transposed: whether each tensor is the transpose of its part of the leaf.
        group: "encoder", or the part of the head that the leaf belongs to.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    stacked: bool
    transposed: bool
    group: str

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each Hugging Face tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def from_tensors(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The Flax leaf, float32, made of its Hugging Face tensors."""
        leaf = np.empty(self.shape, np.float32)
        for index, tensor in enumerate(tensors):
            leaf[index if self.stacked else ...] = tensor.T if self.transposed else tensor
        return leaf

    def to_tensors(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """The Hugging Face tensors, contiguous float32, by name."""
        parts = list(leaf) if self.stacked else [leaf]
        if self.transposed:
            parts = [part.T for part in parts]
        return {
            name: np.ascontiguousarray(part, np.float32)
            for name, part in zip(self.hf_names, parts, strict=True)
        }


def head_of(module: Model) -> str:
    """The name of the module's head: "classification" or "masked_lm"."""
    return "classification" if isinstance(module, SequenceClassifier) else "masked_lm"


def hf_class(module: Model) -> str:
    """The transformers class that is the same model."""
    return _HF_CLASSES[module.config.architecture, head_of(module)]


def parameter_shapes(module: Model) -> dict[str, Any]:
    """Nested dict of `jax.ShapeDtypeStruct`, the parameters' shapes without their values."""
    ids_BxL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.random.key(0)  # only its shape is used
    return jax.eval_shape(module.init, key, ids_BxL, ids_BxL, ids_BxL)["params"]


def leaf_names(module: Model) -> list[LeafName]:
    """The table of a module: every leaf of its parameters exactly once.

    Args:
        module: the model.

    Returns:
        One entry per leaf, the encoder's first.
    """
    config = module.config
    groups = {"encoder": _ENCODER, **_HEADS[config.architecture, head_of(module)]}
    shapes = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(module))
    }
    table = []
    for group, modules in groups.items():
        for flax_module, hf_module, kind in modules:
            stacked = "{layer}" in hf_module
            layers = range(config.num_layers) if stacked else (0,)
            for flax_leaf, suffix, transposed in _LEAVES[kind]:
                path = (*flax_module.split("/"), flax_leaf)
                names = tuple(f"{hf_module.format(layer=layer)}.{suffix}" for layer in layers)
                table.append(LeafName(path, shapes.pop(path), names, stacked, transposed, group))
    if shapes:
        raise AssertionError(f"parameters without a Hugging Face name: {sorted(shapes)}")
    return table


def canonical_name(architecture: str, hf_name: str) -> str:
    """The name without its `bert.` or `roberta.` prefix and with today's names of LayerNorm's parameters.

    >>> canonical_name("bert", "bert.embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    name = hf_name.removeprefix(f"{architecture}.")
    if name.endswith(".gamma"):
        return name.removesuffix("gamma") + "weight"
    if name.endswith(".beta"):
        return name.removesuffix("beta") + "bias"
    return name


def prefixed_name(architecture: str, name: str) -> str:
    """The name in a transformers model with a head: `bert.` before whatever is not the head.

    >>> prefixed_name("bert", "embeddings.LayerNorm.weight"), prefixed_name("bert", "classifier.bias")
    ('bert.embeddings.LayerNorm.weight', 'classifier.bias')
    """
    return f"{architecture}.{name}" if name.startswith(_BACKBONE_PARTS) else name
