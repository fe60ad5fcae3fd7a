"""Saves models as Hugging Face folders with `config.json`, `model.safetensors` and tokenizer files."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from dp_rmt.files import save_tensors, whole_folder
from dp_rmt.models.heads import MaskedLanguageModel, SequenceClassifier
from dp_rmt.models.huggingface import names as hf_names
from dp_rmt.models.huggingface.folder import CONFIG_FILE, TOKENIZER_CONFIG, WEIGHTS_FILE
from dp_rmt.models.huggingface.names import Model


def save_pretrained(
    folder: str | os.PathLike[str],
    module: Model,
    params: dict[str, Any],
    *,
    tokenizer: Any = None,
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Saves a model as a Hugging Face folder that `transformers` loads as the same model.

    The folder appears whole or not at all, because it is written beside its place and renamed. A folder that this
    function wrote before is replaced.

    Args:
        folder: where to save.
        module: the model.
        params: its parameters, with low-rank updates merged into them (`without_lora`).
        tokenizer: a transformers tokenizer to save with it.
        label_names: a name for each logit of a classifier.
        problem_type: what `transformers` makes of the logits, such as "regression"; None lets it guess.
        files: further files of text by name, such as a model card.

    Raises:
        ValueError: the parameters are not the module's, the labels are not as many as its logits, or the module's
            family in transformers has no such model.
        FileExistsError: the place holds something that this function did not write.
    """
    folder = Path(folder).expanduser().absolute()
    hf_config = {**module.config.to_hf_config(), "architectures": [hf_names.hf_class(module)]}
    hf_config.update(_labels(module, label_names))
    hf_config.update({} if problem_type is None else {"problem_type": problem_type})
    tensors = _to_tensors(module, params)
    with whole_folder(folder, WEIGHTS_FILE) as new:
        save_tokenizer(tokenizer, new)
        for name, content in (files or {}).items():
            (new / name).write_text(content, encoding="utf-8")
        text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_tensors(tensors, new / WEIGHTS_FILE)
    logging.info("saved %s to %s", hf_config["architectures"][0], folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer, if there is one, so that versions of transformers before 5 open it, too."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the chat template stands in tokenizer_config.json
    path = folder / TOKENIZER_CONFIG
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":  # the name that version 5 has for the class of before
            text = json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def _labels(module: Model, label_names: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(module, SequenceClassifier):
        if label_names is not None:
            kind = "masked" if isinstance(module, MaskedLanguageModel) else "causal"
            raise ValueError(f"label_names is given for a {kind} language model, which has none; leave it out")
        return {}
    if label_names is None:
        label_names = [f"LABEL_{index}" for index in range(module.num_labels)]  # the names transformers gives
    if len(set(label_names)) != module.num_labels or len(label_names) != module.num_labels:
        raise ValueError(
            f"label_names {list(label_names)} must be {module.num_labels} different names, one for each logit"
        )
    return {
        "id2label": {str(index): name for index, name in enumerate(label_names)},
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def _to_tensors(module: Model, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks that the parameters are the module's, and returns them under their Hugging Face names."""
    flat = flatten_dict(params)
    table = hf_names.leaf_names(module)
    unknown = set(flat) - {leaf.path for leaf in table}
    if unknown:
        raise ValueError(
            f"params has {'/'.join(min(unknown))}, which the module does not have; pass its own parameters"
        )
    tensors, parts = {}, collections.defaultdict[str, list[np.ndarray]](list)
    for leaf in table:
        if leaf.path not in flat:
            raise ValueError(f"params has no {'/'.join(leaf.path)}; pass all parameters, the frozen ones too")
        value = np.asarray(flat[leaf.path])
        if value.shape != leaf.shape:
            raise ValueError(
                f"params has {'/'.join(leaf.path)} of shape {value.shape}, the module expects {leaf.shape}; "
                "pass the module that these parameters were made for"
            )
        for name, part in leaf.slices(value).items():  # the leaves of a fused tensor are in the order of its parts
            parts[name].append(part)
            if len(parts[name]) == leaf.layout.num_parts:
                tensor = np.ascontiguousarray(leaf.layout.join(parts.pop(name)), np.float32)
                tensors[hf_names.prefixed_name(module.config.architecture, name)] = tensor
    if isinstance(module, MaskedLanguageModel) and not module.config.tie_word_embeddings:
        for copy, original in hf_names.tied_copies(module).items():  # nothing ties these in transformers, either
            tensors[copy] = tensors[original].copy()
    return tensors
