"""By which name a card calls the pre-trained model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dp_rmt.finetuning.release.base_model import base_model_of
from dp_rmt.finetuning.settings import Settings


@pytest.mark.parametrize(
    ("path", "base_model", "name", "hub_name"),
    [
        ("package:a_package/model", "{folder}", "a_package", None),
        ("{folder}", "{folder}", "secret_place", None),
        ("org/encoder", "org/encoder", "org/encoder", "org/encoder"),
    ],
)
def test_names_are_public(path: str, base_model: str, name: str, hub_name: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "secret_place"
    folder.mkdir()
    task: Any = SimpleNamespace(base_model=base_model.format(folder=folder), base_folder=str(folder))
    found = base_model_of(Settings().changed({"model.path": path.format(folder=folder)}), task)
    assert (found.name, found.hub_name) == (name, hub_name)
    assert base_model_of(Settings().changed({"release.base_model": "org/other"}), task).name == "org/other"
