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
from dp_rmt.models.encoder_families import ENCODER_FAMILIES
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier, init_params
from dp_rmt.models.huggingface import decoder_names, encoder_names
from dp_rmt.models.huggingface.tensor_layouts import Layout

Model = SequenceClassifier | MaskedLanguageModel | CausalLanguageModel

HEAD_PARTS = encoder_names.HEAD_PARTS
_BUFFERS = rf"embeddings\.(position|token_type)_ids|(.*\.)?({decoder_names.BUFFERS})"
# torch's DataParallel and compile put the first before all names, and models with images the second before the text's.
_WRAPPERS = r"^((module|_orig_mod)\.)+"
_TEXT_PART = r"^(model\.)?language_model\.(model\.)?"
_HF_HEADS = {"classification": "ForSequenceClassification", "masked_lm": "ForMaskedLM"}


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
    return ENCODER_FAMILIES[module.config.architecture].hf_prefix + _HF_HEADS[head_of(module)]


def tied_copies(module: Model) -> dict[str, str]:
    """The tensors that a file may hold twice, though the module has them once: copy -> original."""
    if isinstance(module, CausalLanguageModel):
        *_, head = decoder_names.module_names(module.config)
        table = decoder_names.module_names(module.config)[0]
        return {f"{head.hf_name}.weight": f"{table.hf_name}.weight"} if module.config.tie_word_embeddings else {}
    return encoder_names.tied_copies(module.config.architecture, is_tied=module.config.tie_word_embeddings)


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
        if shape is None:  # this model does not have the feature
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
    for group, modules in encoder_names.groups_of(module.config.architecture, head_of(module)).items():
        for flax_module, hf_module, kind in modules:
            for leaf, suffix, layout in encoder_names.LEAVES[kind]:
                yield (*flax_module.split("/"), leaf), hf_module, suffix, layout, 0, group


def canonical_name(architecture: str, hf_name: str) -> str:
    """Returns the name without its prefix, such as `bert.`, and with today's names of LayerNorm's parameters.

    The prefixes of whatever the model was wrapped in when it was saved go, too.

    >>> canonical_name("bert", "bert.embeddings.LayerNorm.gamma")
    'embeddings.LayerNorm.weight'
    """
    hf_name = re.sub(_WRAPPERS, "", hf_name)
    if architecture in FAMILIES:
        hf_name = re.sub(_TEXT_PART, "", hf_name)
        return hf_name.removeprefix(decoder_names.prefix(architecture))
    name = hf_name.removeprefix(ENCODER_FAMILIES[architecture].prefix)
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
    return ENCODER_FAMILIES[architecture].prefix + name if name.startswith(encoder_names.BACKBONE_PARTS) else name
