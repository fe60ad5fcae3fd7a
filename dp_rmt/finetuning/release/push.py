"""Uploads a released folder to the Hugging Face hub: what a model needs, and nothing else.

The check is an allow-list. A folder with any other file is refused, so that neither a run's folder, whose checkpoints
hold the key of the noise, nor a note beside a model is published by mistake.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dp_rmt.extras import extra
from dp_rmt.reporting.model_card import FILE as CARD

with extra("finetune"):
    import huggingface_hub

_PUBLIC = re.compile(
    r"README\.md|LICENSE(\.\w+)?|config\.json|generation_config\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|tokenizer(_config)?\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt|privacy\.(json|md)"
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_OF_A_RUN = ("privacy", "train", "data")
"""Groups of a run's settings, which no model's `config.json` has."""


def push(folder: Path, repo: str, *, is_public: bool = False) -> str:
    """Uploads a folder that may be released.

    Args:
      folder: `model/` or `adapter/` of a run, or a copy that `Finetuned.save` made.
      repo: name on the hub, ``organisation/name``; it is made if there is none.
      is_public: makes a new repository public.

    Returns:
      A line for the terminal.

    Raises:
      FileNotFoundError: there is no such folder, or it lacks weights or model card.
      ValueError: something private lies in the folder; nothing was uploaded.
      RuntimeError: the hub did not take it.
    """
    check(folder)
    hub = huggingface_hub.HfApi(library_name="dp_rmt")
    try:
        hub.create_repo(repo, private=not is_public, exist_ok=True)
        found = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="A model that dp_rmt trained")
    except Exception as error:  # the hub client raises many unrelated types: HTTP, validation, offline, login
        raise RuntimeError(
            f"{repo} could not be uploaded ({type(error).__name__}: {error}). Log in with `hf auth login`, and check "
            "that you may write there"
        ) from error
    who = "public, if it is new" if is_public else "private, if it is new"
    return f"{folder} is uploaded ({who}): {found}"


def check(folder: Path) -> None:
    """Makes sure that a folder holds a model and its card, and nothing else; errors as in `push`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give model/ or adapter/ of a run")
    paths = sorted(folder.iterdir())
    private = [path.name for path in paths if path.is_symlink() or path.is_dir() or not _PUBLIC.fullmatch(path.name)]
    private += [name for name in ("config.json", "privacy.json") if _is_of_a_run(_read(folder / name))]
    if private:
        advice = f"{folder}/model" if (folder / "model").is_dir() else "a folder with the model alone"
        raise ValueError(
            f"{folder} holds {', '.join(private[:5])}, which may be private (a run's files have seeds, the key of the "
            f"noise, and paths): nothing was uploaded. Give {advice}, or remove what is not the model's"
        )
    names = {path.name for path in paths}
    if not names & {*_WEIGHTS}:
        raise FileNotFoundError(f"{folder} has no weights ({' or '.join(_WEIGHTS)}): give model/ or adapter/ of a run")
    if CARD not in names:
        raise FileNotFoundError(
            f"{folder} has no {CARD}, which says what its privacy rests on: run the same command again, which writes it"
        )


def _is_of_a_run(found: dict[str, Any]) -> bool:
    """Whether a file is the `config.json` of a run, which may hold seeds, or its `privacy.json` with its command."""
    return any(isinstance(found.get(name), dict) for name in _OF_A_RUN) or bool(
        (found.get("about") or {}).get("command")
    )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
