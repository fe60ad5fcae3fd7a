"""One table of Flax parameter paths and Hugging Face tensor names, which loading and saving both use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from dp_rmt.models.decoder.families import FAMILIES
from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier, init_params
from dp_rmt.models.huggingface import decoder_names
from dp_rmt.models.huggingface.tensor_layouts import PLAIN, TRANSPOSED, Layout

Model = SequenceClassifier | MaskedLanguageModel | CausalLanguageModel

# The parts of each kind of layer of the encoders: Flax leaf, Hugging Face suffix, layout.
_LEAVES: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "dense": (("kernel", "weight", TRANSPOSED), ("bias", "bias", PLAIN)),
    "layer_norm": (("scale", "weight", PLAIN), ("bias", "bias", PLAIN)),
    "embedding": (("embedding", "weight", PLAIN),),
    "bias": (("bias", "bias", PLAIN),),
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
# The groups of a head. A group is loaded as a whole or, if it is absent, initialised as a whole.
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
_BUFFERS = rf"embeddings\.(position|token_type)_ids|(.*\.)?({decoder_names.BUFFERS})"
# The copies of tied weights that some checkpoints carry, by architecture: copy -> original.
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
    """A Flax leaf, and the Hugging Face tensors that hold it.

    Attributes:
        path: keys into the nested parameter dict.
        shape: shape of the leaf.
        hf_names: the tensor of each layer if the leaf is stacked, else the one tensor; without the `bert.` prefix.
        stacked: whether the leaf's first axis is the layer.
        layout: how each tensor holds its part of the leaf.
        group: "encoder" or "decoder", or the part of the head that the leaf belongs to.
        part: which part of each tensor belongs to the leaf, if several leaves share the tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    stacked: bool
    layout: Layout
    group: str
    part: int = 0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each Hugging Face tensor."""
        return self.layout.tensor_shape(self.shape[1:] if self.stacked else self.shape)

    def slices(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """Returns each part of a leaf as a view, by the name of its tensor."""
        return dict(zip(self.hf_names, leaf if self.stacked else [leaf], strict=True))


def head_of(module: Model) -> str:
    """The name of the module's head: "classification", "masked_lm" or "causal_lm"."""
    if isinstance(module, CausalLanguageModel):
        return "causal_lm"
    return "classification" if isinstance(module, SequenceClassifier) else "masked_lm"


def hf_class(module: Model) -> str:
    """The name of the transformers class that is the same model."""
    if isinstance(module, CausalLanguageModel):
        return FAMILIES[module.config.architecture].hf_class
    return _HF_CLASSES[module.config.architecture, head_of(module)]


def tied_copies(module: Model) -> dict[str, str]:
    """The tensors that a file may hold twice, though the module has them once: copy -> original."""
    if isinstance(module, CausalLanguageModel):
        *_, head = decoder_names.module_names(module.config)
        table = decoder_names.module_names(module.config)[0]
        return {f"{head.hf_name}.weight": f"{table.hf_name}.weight"} if module.config.tie_word_embeddings else {}
    return TIED_COPIES[module.config.architecture]


def is_buffer(name: str) -> bool:
    """Tells whether a tensor is a constant that old files hold besides parameters."""
    return re.fullmatch(_BUFFERS, name) is not None


def leaf_names(module: Model) -> list[LeafName]:
    """Makes the table of a module, in which every leaf of its parameters stands exactly once.

    Args:
        module: the model, without LoRA.

    Returns:
        One entry for each leaf, those of the encoder or decoder first.

    Raises:
        ValueError: the module has LoRA, which these files have no place for.
    """
    if module.config.lora is not None:
        raise ValueError(
            "the model has low-rank updates, which Hugging Face models have no place for; merge them into its "
            "weights first: without_lora(module, params)"
        )
    shapes = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    leaves = {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}
    table = []
    for path, hf_module, suffix, layout, part, group in _entries(module):
        shape = leaves.pop(path, None)
        if shape is None:  # this decoder does not have the feature
            continue
        stacked = "{layer}" in hf_module
        layers = range(module.config.num_layers) if stacked else (0,)
        names = tuple(f"{hf_module.format(layer=layer)}.{suffix}" for layer in layers)
        table.append(LeafName(path, shape, names, stacked, layout, group, part))
    if leaves:
        raise AssertionError(f"parameters without a Hugging Face name: {sorted(leaves)}")
    return table


def _entries(module: Model) -> Iterator[tuple[tuple[str, ...], str, str, Layout, int, str]]:
    """Yields for each leaf its path, Hugging Face module, suffix, layout, part and group."""
    if isinstance(module, CausalLanguageModel):
        for entry in decoder_names.module_names(module.config):
            for leaf, suffix, layout, part in entry.leaves:
                yield (*entry.path.split("/"), leaf), entry.hf_name, suffix, layout, part, entry.path.split("/")[0]
        return
    groups = {"encoder": _ENCODER, **_HEADS[module.config.architecture, head_of(module)]}
    for group, modules in groups.items():
        for flax_module, hf_module, kind in modules:
            for leaf, suffix, layout in _LEAVES[kind]:
                yield (*flax_module.split("/"), leaf), hf_module, suffix, layout, 0, group


def canonical_name(architecture: str, hf_name: str) -> str:
    """Returns the name without its prefix, such as `bert.`, and with today's names of LayerNorm's parameters.

    >>> canonical_name("bert", "bert.embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    if architecture in FAMILIES:
        return hf_name.removeprefix(decoder_names.prefix(architecture))
    name = hf_name.removeprefix(f"{architecture}.")
    if name.endswith(".gamma"):
        return name.removesuffix("gamma") + "weight"
    if name.endswith(".beta"):
        return name.removesuffix("beta") + "bias"
    return name


def prefixed_name(architecture: str, name: str) -> str:
    """Returns the name in a transformers model with a head, which has `bert.` before whatever is not the head.

    >>> prefixed_name("bert", "embeddings.LayerNorm.weight"), prefixed_name("bert", "classifier.bias")
    ('bert.embeddings.LayerNorm.weight', 'classifier.bias')
    """
    if architecture in FAMILIES:
        is_head = name.startswith(("lm_head.", "embed_out."))
        return name if is_head else decoder_names.prefix(architecture) + name
    return f"{architecture}.{name}" if name.startswith(_BACKBONE_PARTS) else name
