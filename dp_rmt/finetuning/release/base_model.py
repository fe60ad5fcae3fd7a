"""The public name of the pre-trained model, and what its own card says of licence and language."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dp_rmt.extras import extra
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Task

with extra("finetune"):
    import huggingface_hub

_ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """What may be said of a pre-trained model.

    Attributes:
      name: its public name, that of the package which it was installed with, or the last part of its folder's path.
      hub_name: its name on the hub; None if it is not known to be there.
      licence: fields of a card's header about the licence.
      languages: codes such as "en".
    """

    name: str
    hub_name: str | None
    licence: Mapping[str, str]
    languages: tuple[str, ...]


def base_model_of(settings: Settings, task: Task) -> BaseModel:
    """What may be said of the model that a run begins with.

    Args:
      settings: their release is read.
      task: knows where the model was read.
    """
    path, folder = task.base_model, Path(task.base_folder)
    is_folder = Path(path).expanduser() == folder
    hub_name = settings.release.base_model or (None if is_folder else path)
    if hub_name is not None and not _ON_THE_HUB.fullmatch(hub_name):
        hub_name = None
    header = _header(folder / "README.md")
    given = settings.release
    licence = {key: str(header[key]) for key in ("license", "license_name", "license_link") if header.get(key)}
    spoken = header.get("language") or ()
    return BaseModel(
        name=given.base_model or hub_name or _package(settings.model.path) or Path(path).name,
        hub_name=hub_name,
        licence=licence if given.license is None else {"license": given.license},
        languages=given.language or ((spoken,) if isinstance(spoken, str) else tuple(map(str, spoken))),
    )


def _package(path: str) -> str | None:
    """The name of the package in ``package:NAME/FOLDER``, which is public; None for a path of another kind."""
    return path.removeprefix("package:").split("/")[0] if path.startswith("package:") else None


def _header(card: Path) -> dict[str, Any]:
    """The YAML header of the pre-trained model's own card; empty where there is none."""
    if not card.is_file():
        return {}
    try:
        return huggingface_hub.metadata_load(card) or {}
    except Exception as error:  # whatever YAML finds wrong in somebody else's file: no reason for a run to fail
        logging.warning("%s: its header could not be read (%s); give config.release.license yourself", card, error)
        return {}
