"""`dp-rmt push` uploads a model with its card, and nothing where anything private lies beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dp_rmt.finetuning.release.push import push

MODEL = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was asked of the hub."""
    found: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def __init__(self, **options: Any) -> None: ...

        def create_repo(self, repo: str, **options: Any) -> None:
            found.append(("create", {"repo_id": repo, **options}))

        def upload_folder(self, **options: Any) -> str:
            found.append(("upload", options))
            return f"https://huggingface.co/{options['repo_id']}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in MODEL:
        (tmp_path / "model" / name).write_text('{"model_type": "bert"}')
    return tmp_path / "model"


@pytest.mark.parametrize("is_public", [False, True])
def test_a_models_folder_is_uploaded_whole(
    is_public: bool, folder: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    said = push(folder, "me/small", is_public=is_public)
    assert [name for name, _ in calls] == ["create", "upload"]
    assert calls[0][1] == {"repo_id": "me/small", "private": not is_public, "exist_ok": True}
    assert (calls[1][1]["repo_id"], calls[1][1]["folder_path"]) == ("me/small", folder)
    assert "https://huggingface.co/me/small" in said


PRIVATE = {
    "checkpoints/7/state": "",
    "ledger.jsonl": "{}",
    "metrics.jsonl": "{}",
    "texts.jsonl": "{}",
    "report.html": "",
    "notes.txt": "",
    ".hidden": "",
    "audit.json": "{}",
    "scores.json": "{}",
    "generation.json": "{}",
    "config.json": json.dumps({"privacy": {"noise_seed": 7}}),
    "privacy.json": json.dumps({"about": {"command": "dp-rmt finetune --workdir=/home/me"}}),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_nothing_is_uploaded_while_a_private_file_is_there(
    name: str, folder: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(PRIVATE[name])
    with pytest.raises(ValueError, match=rf"holds {name.partition('/')[0]}.*nothing was uploaded. Give "):
        push(folder, "me/small")
    assert calls == []


def test_a_link_out_of_the_folder_is_refused(folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> None:
    (folder / "vocab.txt").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(ValueError, match=r"holds vocab\.txt"):
        push(folder, "me/small")
    assert calls == []


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_folder_without_card_or_weights_is_refused(
    name: str, folder: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        push(folder, "me/small")
    assert calls == []


def test_a_runs_folder_names_the_model_in_it(folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> None:
    (folder.parent / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoints, model, .*Give .*/model, or remove"):
        push(folder.parent, "me/small")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        push(folder / "nowhere", "me/small")
    assert calls == []


def test_what_the_hub_says_comes_with_advice(folder: Path) -> None:
    """Offline, as all tests are."""
    with pytest.raises(RuntimeError, match=r"me/small could not be uploaded .*`hf auth login`"):
        push(folder, "me/small")
