"""Says where a PEFT adapter keeps a model's low-rank updates, by the one table of Hugging Face names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dp_rmt.models.decoder.model import CausalLanguageModel
from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.names import LeafName, Model
from dp_rmt.models.lora import SUFFIX, LoRAConfig
from dp_rmt.models.tuning import parameter_shapes

PREFIX = "base_model.model."
"""The prefix of every name in an adapter file."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A module of a transformers model that has a low-rank update, in one layer.

    A file may fuse several of this library's dense layers, its parts, into one module W = [W_1 W_2 ...]. The updates
    A_p B_p of its parts are together an update of rank n r with A = [A_1 A_2 ...] and block-diagonal B. Its alpha is n
    alpha, so that alpha / rank stays.

    Attributes:
        name: name of the module.
        layer: its index in the stacked leaves.
        parts: the kernels of this library that have updates, in their order in the module; mostly one.
        rank: rank of the update of each part.
    """

    name: str
    layer: int
    parts: tuple[LeafName, ...]
    rank: int

    @property
    def is_conv1d(self) -> bool:
        """Tells whether the module stores its matrix as (in, out), as GPT-2's Conv1D does."""
        return self.parts[0].layout.tensor_shape((1, 2))[0] == 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by tensor name: A is (n r, in), and B is (out, n r)."""
        rank, leaf = self.rank * len(self.parts), self.parts[0]
        rows = max(leaf.layout.tensor_shape((1, leaf.shape[-1])))
        a, b = self.tensor_names
        return {a: (rank, leaf.shape[-2]), b: (rows, rank)}

    @property
    def tensor_names(self) -> tuple[str, str]:
        """The tensor names of A and of B."""
        return f"{PREFIX}{self.name}.lora_A.weight", f"{PREFIX}{self.name}.lora_B.weight"

    def paths(self, leaf: LeafName) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The paths of the A and B of a part."""
        *parents, name, kernel = leaf.path
        a, b = ((*parents, name + SUFFIX, factor, kernel) for factor in ("lora_a", "lora_b"))
        return a, b

    def to_tensors(self, read: Callable[[tuple[str, ...]], np.ndarray]) -> dict[str, np.ndarray]:
        """Makes the two tensors; `read` returns a stacked leaf."""
        factors = [[read(path)[self.layer] for path in self.paths(leaf)] for leaf in self.parts]
        columns = []
        for leaf, (_, b) in zip(self.parts, factors):
            widths = leaf.layout.widths or (b.shape[-1],) * leaf.layout.num_parts
            parts = [
                b if part == leaf.part else np.zeros((len(b), width), b.dtype) for part, width in enumerate(widths)
            ]
            fused = leaf.layout.join(parts)
            columns.append(fused.T if self.is_conv1d else fused)
        pair = np.concatenate([a.T for a, _ in factors]), np.concatenate(columns, axis=1)
        return {name: np.ascontiguousarray(x, np.float32) for name, x in zip(self.tensor_names, pair)}

    def from_tensors(self, tensors: dict[str, np.ndarray]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """Yields path and value of each A and B for this layer.

        Raises:
            ValueError: an update of a fused module does not update its parts separately.
        """
        a_name, b_name = self.tensor_names
        for index, leaf in enumerate(self.parts):
            some = slice(index * self.rank, (index + 1) * self.rank)
            a_path, b_path = self.paths(leaf)
            fused = tensors[b_name][:, some]
            fused = fused.T if self.is_conv1d else fused
            parts = [leaf.layout.take(fused, part) for part in range(leaf.layout.num_parts)]
            if any(part.any() for number, part in enumerate(parts) if number != leaf.part):
                raise ValueError(
                    f"tensor {b_name} is not block-diagonal: it updates the query, key and value of the fused module "
                    "together, which are separate matrices here; merge that adapter into its base model with peft "
                    "(merge_and_unload), save that, and load it"
                )
            yield a_path, tensors[a_name][some].T
            yield b_path, parts[leaf.part]


def adapted_config(module: Model) -> LoRAConfig:
    """Returns the module's LoRA configuration, or raises ValueError if it has none."""
    if module.config.lora is None:
        raise ValueError(
            "the model has no low-rank updates; put them in with with_lora(module, params, ...), or take "
            "save_pretrained and load_pretrained for a model without"
        )
    return module.config.lora


def adapted_modules(module: Model, table: Sequence[LeafName]) -> list[Adapted]:
    """Lists every module of the transformers model that has a low-rank update, layer by layer.

    Args:
        module: a model with LoRA.
        table: the names of the model without LoRA.

    Returns:
        One entry for each module and layer.

    Raises:
        ValueError: the model has no LoRA.
    """
    rank = adapted_config(module).rank
    paths, found = parameter_shapes(module), dict[tuple[str, int], list[LeafName]]()
    for leaf in table:
        *parents, name, kernel = leaf.path
        if (*parents, name + SUFFIX, "lora_a", kernel) in paths:
            for layer, tensor in enumerate(leaf.hf_names):
                found.setdefault((module_of(module, tensor), layer), []).append(leaf)
    return [Adapted(name, layer, tuple(parts), rank) for (name, layer), parts in found.items()]


def module_of(module: Model, tensor: str) -> str:
    """The transformers module that has a tensor of the table as its parameter."""
    return base_name(module, tensor).rpartition(".")[0]


def base_name(module: Model, tensor: str) -> str:
    """The name of a tensor of the table in the model that the adapter is put on, which is the one that was loaded."""
    name = hf_names.prefixed_name(module.config.architecture, tensor)
    is_text_part = isinstance(module, CausalLanguageModel) and module.config.is_text_part
    return name.replace("model.", "model.language_model.", 1) if is_text_part else name


def shortest_endings(names: Sequence[str], others: Sequence[str], *, dot: str) -> list[str]:
    """Shortens each name to its last few parts, as few as tell it apart from all others.

    Args:
        names: dotted names. Names that share an ending share it in the result.
        others: names that must not be matched.
        dot: what stands before an ending in a longer name that it matches, which is "." or "" for anything.

    Returns:
        The endings, each once.

    >>> shortest_endings(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.mlp.c_proj"], dot=".")
    ['attn.c_proj']
    """
    endings: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        fits = (ending for ending in candidates if not any(matches(other, [ending], dot=dot) for other in others))
        endings[next(fits, name)] = None
    return list(endings)


def matches(name: str, endings: Sequence[str], *, dot: str = ".") -> bool:
    """Tells whether a name is one of the endings, or ends with one after a dot."""
    return any(name == ending or name.endswith(dot + ending) for ending in endings)


def pattern_value(pattern: dict[str, float], name: str, default: float) -> float:
    """The value that PEFT takes for a module from a `rank_pattern` or `alpha_pattern`, by the first key that fits."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
