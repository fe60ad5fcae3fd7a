"""Save models as Hugging Face folders: `config.json`, `model.safetensors`, tokenizer files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from dp_rmt.models import hf_names
from dp_rmt.models.heads import MaskedLanguageModel
from dp_rmt.models.hf_folder import CONFIG_FILE, WEIGHTS_FILE
from dp_rmt.models.hf_names import Model

logger = logging.getLogger(__name__)

_METADATA = {"format": "pt", "producer": "dp_rmt"}  # transformers insists on a known "format"


def save_pretrained(
    folder: str | os.PathLike[str],
    module: Model,
    params: dict[str, Any],
    *,
    tokenizer: Any = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Saves a model as a Hugging Face folder that `transformers` loads as the same model.

    The folder appears whole or not at all: it is written beside its place and renamed. A folder that this
    function wrote before is replaced.

    Args:
        folder: where to save.
        module: the model.
        params: its parameters.
        tokenizer: a transformers tokenizer to save with it.
        label_names: a name for each logit of a classifier.

    Raises:
        ValueError: if the parameters are not the module's, or the labels not as many as its logits.
        FileExistsError: if the place holds something that this function did not write.
    """
    folder = Path(folder).expanduser().absolute()
    hf_config = {**module.config.to_hf_config(), "architectures": [hf_names.hf_class(module)]}
    hf_config.update(_labels(module, label_names))
    tensors = _to_tensors(module, params)
    if not _may_replace(folder):
        raise FileExistsError(
            f"{folder} holds files that save_pretrained did not write; give a new folder, or remove that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        safetensors.numpy.save_file(tensors, new / WEIGHTS_FILE, metadata=_METADATA)
        shutil.copymode(new / CONFIG_FILE, new / WEIGHTS_FILE)  # safetensors makes it private to the user
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    logger.info("saved %s to %s", hf_config["architectures"][0], folder)


def _labels(module: Model, label_names: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(module, MaskedLanguageModel):
        if label_names is not None:
            raise ValueError("label_names is given for a masked language model, which has none; leave it out")
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
    """The parameters under their Hugging Face names, once they are checked to be the module's."""
    flat = flatten_dict(params)
    table = hf_names.leaf_names(module)
    unknown = set(flat) - {leaf.path for leaf in table}
    if unknown:
        raise ValueError(
            f"params has {'/'.join(min(unknown))}, which the module does not have; pass its own parameters"
        )
    tensors = {}
    for leaf in table:
        if leaf.path not in flat:
            raise ValueError(f"params has no {'/'.join(leaf.path)}; pass all parameters, the frozen ones too")
        value = np.asarray(flat[leaf.path])
        if value.shape != leaf.shape:
            raise ValueError(
                f"params has {'/'.join(leaf.path)} of shape {value.shape}, the module expects {leaf.shape}; "
                "pass the module that these parameters were made for"
            )
        for name, tensor in leaf.to_tensors(value).items():
            tensors[hf_names.prefixed_name(module.config.architecture, name)] = tensor
    return tensors


def _may_replace(folder: Path) -> bool:
    """Whether the place is free, an empty folder, or a folder that save_pretrained wrote."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, "numpy") as file:
            return (file.metadata() or {}).get("producer") == _METADATA["producer"]
    except (OSError, safetensors.SafetensorError):
        return False
