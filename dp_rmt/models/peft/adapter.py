"""Low-rank updates as a folder of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dp_rmt.extras import extra
from dp_rmt.files import is_written_here, save_tensors, whole_folder
from dp_rmt.models.heads import MaskedLanguageModel
from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.labels import in_file_order, in_label_order
from dp_rmt.models.huggingface.names import LeafName, Model
from dp_rmt.models.huggingface.saving import save_tokenizer
from dp_rmt.models.lora import with_config
from dp_rmt.models.peft.config import CONFIG_FILE, adapter_config, check_scale, read_adapter_config
from dp_rmt.models.peft.names import PREFIX, Adapted, adapted_config, adapted_modules, base_name, module_of
from dp_rmt.models.tuning import parameter_shapes, trainable_pattern

with extra("finetune"):
    import safetensors
    import safetensors.numpy


WEIGHTS_FILE = "adapter_model.safetensors"
_MERGE = "merge the updates into the weights and save a model: save_pretrained(folder, *without_lora(module, params))"


def save_adapter(
    folder: str | os.PathLike[str],
    module: Model,
    params: dict[str, Any],
    *,
    base_model_name_or_path: str,
    trained: str | None = None,
    tokenizer: Any = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Saves the low-rank updates of a model as an adapter that `peft` puts on the base model.

    The classification head, and whatever else was trained, is saved with them as whole modules. The folder appears
    whole or not at all, as with `save_pretrained`.

    Args:
        folder: where to save.
        module: a model with LoRA.
        params: its parameters.
        base_model_name_or_path: the folder or hub name of the base model, as `peft` notes it down.
        trained: a regular expression of the paths that were trained; None for low-rank updates and classification head.
        tokenizer: a transformers tokenizer to save with it.
        files: further files of text by name, such as a model card.

    Raises:
        ValueError: the model has no LoRA, the parameters are not its own, or an adapter cannot hold what was trained.
        FileExistsError: the place holds something that this function did not write.
    """
    table = _plain_table(module)
    adapted, shapes, flat = adapted_modules(module, table), parameter_shapes(module), flatten_dict(params)

    @functools.cache
    def read(path: tuple[str, ...]) -> np.ndarray:
        name = "/".join(path)
        if path not in flat:
            raise ValueError(f"params has no {name}; pass all parameters of the module")
        if flat[path].shape != shapes[path].shape:
            raise ValueError(
                f"params has {name} of shape {flat[path].shape}, the module expects {shapes[path].shape}; pass the "
                "module that these parameters were made for"
            )
        return np.asarray(flat[path])

    tensors: dict[str, np.ndarray] = {}
    for one in adapted:
        tensors |= one.to_tensors(read)
    whole = _whole_leaves(module, table, adapted, trained)
    for leaf in whole:
        for name, part in zip(_tensor_names(module, leaf), leaf.slices(read(leaf.path)).values()):
            part = in_file_order(module, leaf, part)
            tensors[name] = np.ascontiguousarray(leaf.layout.join([part]), np.float32)
    for leaf in table:
        for copy in _copies(module, whole, leaf):
            tensors[copy] = np.array(read(leaf.path), np.float32)
    config = adapter_config(module, table, adapted, whole) | {"base_model_name_or_path": base_model_name_or_path}
    folder = Path(folder).expanduser().absolute()
    with whole_folder(folder, WEIGHTS_FILE) as new:
        save_tokenizer(tokenizer, new)
        for name, content in (files or {}).items():
            (new / name).write_text(content, encoding="utf-8")
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tensors(tensors, new / WEIGHTS_FILE)
    logging.info("saved an adapter to %s", folder)


def load_adapter(folder: str | os.PathLike[str], module: Model) -> dict[str, Any]:
    """Reads an adapter that `save_adapter` or `peft` saved.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        module: a model with LoRA of the adapter's rank, alpha and targets.

    Returns:
        A nested dict of float32 arrays: A and B of each low-rank update, and the modules that the adapter holds whole,
        such as a classification head. `dp_rmt.models.tuning.with_leaves` puts them into the parameters of a model.

    Raises:
        FileNotFoundError: the folder or a file in it is absent.
        ValueError: the adapter is of another kind, rank, alpha or shape than the module's low-rank updates, or on other
            modules; the message names file and tensor.
    """
    table, path = _plain_table(module), Path(folder).expanduser() / WEIGHTS_FILE
    adapted = adapted_modules(module, table)
    config_path = path.with_name(CONFIG_FILE)
    config, tensors = read_adapter_config(config_path), _read_tensors(path)
    _check_names(module, table, adapted, tensors, path)
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for one in adapted:
        check_scale(module, one, config, config_path)
        _check_shapes(one.shapes, tensors, path)
        try:
            for leaf_path, value in one.from_tensors(tensors):
                stack = leaves.setdefault(leaf_path, np.empty((module.config.num_layers, *value.shape), np.float32))
                stack[one.layer] = value
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return unflatten_dict(leaves | _read_whole_leaves(module, table, tensors, path))


# ---- What is in an adapter besides low-rank updates -----------------------------------------------------------------


def _whole_leaves(module: Model, table: list[LeafName], adapted: list[Adapted], trained: str | None) -> list[LeafName]:
    """The leaves of all modules that are saved whole, which have a trained leaf or are the classification head."""
    patterns = [trainable_pattern("lora", module), *([trained] if trained else [])]
    bases, chosen = {leaf.path[:-1] for one in adapted for leaf in one.parts}, set()
    for leaf in table:
        path = "/".join(leaf.path)
        if not any(re.search(pattern, path) for pattern in patterns):
            continue
        kinds = {other.path[-1] for other in table if other.path[:-1] == leaf.path[:-1]}
        has_place = kinds & {"kernel", "scale"} or leaf.path[:-1] == ("mlm_head",)
        if leaf.path[:-1] in bases or leaf.layout.num_parts > 1 or not has_place:
            raise ValueError(
                f"{path} was trained beside low-rank updates, which an adapter has no place for: it holds low-rank "
                f"updates, and whole dense layers and norms without them; {_MERGE}"
            )
        chosen.add(leaf.path[:-1])
    return [leaf for leaf in table if leaf.path[:-1] in chosen]


def _read_whole_leaves(
    module: Model, table: list[LeafName], tensors: dict[str, np.ndarray], path: Path
) -> dict[tuple[str, ...], np.ndarray]:
    """Reads all leaves of each module of which the file has a tensor that is not of a low-rank update."""
    names = {leaf.path: _tensor_names(module, leaf) for leaf in table}
    present = {leaf.path[:-1] for leaf in table if any(name in tensors for name in names[leaf.path])}
    leaves = {}
    for leaf in table:
        if leaf.path[:-1] in present:
            _check_shapes(dict.fromkeys(names[leaf.path], leaf.hf_shape), tensors, path)
            parts = [leaf.layout.take(tensors[name], leaf.part) for name in names[leaf.path]]
            values = np.array(parts if leaf.stacked else parts[0], np.float32)
            leaves[leaf.path] = in_label_order(module, leaf, values)
    return leaves


def _plain_table(module: Model) -> list[LeafName]:
    return hf_names.leaf_names(with_config(module, lora=None))


def _tensor_names(module: Model, leaf: LeafName) -> list[str]:
    return [_tensor_name(module, name) for name in leaf.hf_names]


def _tensor_name(module: Model, name: str) -> str:
    return PREFIX + base_name(module, name)


def _copies(module: Model, whole: list[LeafName], leaf: LeafName) -> list[str]:
    """The names under which modules that are saved whole hold a leaf again, as a head does with the word embedding."""
    modules = [f"{module_of(module, name)}." for other in whole for name in other.hf_names]
    copies = hf_names.tied_copies(module).items() if isinstance(module, MaskedLanguageModel) else ()
    return [
        _tensor_name(module, copy)
        for copy, original in copies
        if original in leaf.hf_names and copy.startswith(tuple(modules))
    ]


# ---- The tensors ----------------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; if the folder has an adapter_model.bin, save it again with a newer version of peft"
        )
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); save or download it again") from error


def _check_names(
    module: Model, table: list[LeafName], adapted: list[Adapted], tensors: dict[str, np.ndarray], path: Path
) -> None:
    """Raises if the file holds something that the model has no place for."""
    known = {name for one in adapted for name in one.tensor_names}
    known |= {name for leaf in table if leaf.layout.num_parts == 1 for name in _tensor_names(module, leaf)}
    copies = [copy for leaf in table for copy in _copies(module, table, leaf)]
    if is_written_here(path):  # anybody else may have trained the copy
        known |= set(copies)
    unknown = sorted(set(tensors) - known)
    if unknown:
        lora = adapted_config(module)
        raise ValueError(
            f"{path} has tensor {unknown[0]} of shape {tensors[unknown[0]].shape}, which the model has no place for; "
            f"its low-rank updates are on {', '.join(lora.targets)} of {module.config.num_layers} layers. Load the "
            "base model that this adapter was made for, with LoRA on the adapter's target_modules"
        )


def _check_shapes(shapes: dict[str, tuple[int, ...]], tensors: dict[str, np.ndarray], path: Path) -> None:
    advice = "load the base model that this adapter was made for, with LoRA on the adapter's target_modules"
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name} of shape {shape}, which the model calls for; {advice}")
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tensors[name].shape}, expected {shape}; {advice}")
