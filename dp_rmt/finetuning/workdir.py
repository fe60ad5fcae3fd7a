"""Each experiment has its own folder: a folder that another experiment has written is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.files import check_can_be_written, close_to_others, write_atomically, write_private
from dp_rmt.finetuning.settings import Settings

CONFIG_FILE = "config.json"
NOT_THE_EXPERIMENT = (
    *("mesh.", "checkpoints.", "generation.", "release.", "writers."),
    *("train.eval_every", "train.eval_batch_size", "train.checkpoint_every", "data.max_eval_documents"),
    *("data.path", "data.dev_path", "data.test_path", "data.cache_dir", "model.path", "whitening.text"),
)
"""Settings that may differ between a run and its continuation: where it runs, which checkpoints it keeps, how often it
is evaluated and saved, how it writes and is released, who else gets its metrics, and where its files lie. A checkpoint
knows the rows and the pre-trained model by their content, and refuses to go on with others
(`dp_rmt.training.checkpoint`)."""
LAST_OF_THE_OLD_LAYOUT = "227de1b"
"""The last commit whose settings had groups `denoise` and `optimizer`."""


def claim_workdir(workdir: Path, settings: Settings) -> None:
    """Makes the folder this experiment's, or makes sure that it already is.

    Its ``config.json`` says the settings that the run goes on with, where they may differ from those it began with.
    Settings that give the seeds of sampling or noise are written so that others cannot read them.

    Args:
      workdir: a new or empty folder, or one that equal settings have claimed before (the run is then resumed).
      settings: settings of the experiment.

    Raises:
      ValueError: the folder holds another experiment; the keys that differ are listed.
      FileExistsError: the folder holds something else.
    """
    check_workdir(workdir, settings)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG_FILE
    record = as_json(settings)
    text = json.dumps(record, indent=2) + "\n"
    is_new = not path.exists() or json.loads(path.read_text(encoding="utf-8")) != record
    if not _gives_seeds(record):
        if is_new:
            write_atomically(path, text)
        return
    if path.exists():
        close_to_others(path)
    if is_new:
        write_private(path, text)


def check_workdir(workdir: Path, settings: Settings) -> None:
    """The checks of `claim_workdir`, without writing anything."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        foreign = sorted(entry.name for entry in workdir.iterdir()) if workdir.is_dir() else []
        if foreign or workdir.is_file():
            raise FileExistsError(
                f"{workdir} is not empty and holds no {CONFIG_FILE} (found {', '.join(foreign[:5]) or 'a file'}): "
                "give a new --workdir"
            )
        check_can_be_written(workdir)  # before the model is loaded
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give a new --workdir, or put the file back") from error
    if isinstance(record.get("optimizer"), dict):
        raise ValueError(
            f"{workdir} holds a run of an earlier dp_rmt, whose settings were laid out otherwise: commit "
            f"{LAST_OF_THE_OLD_LAYOUT} of dp_rmt finishes it; here give a new --workdir"
        )
    saved, now, defaults = flatten(record), flatten(as_json(settings)), flatten(as_json(Settings()))
    # An option that the record lacks came later: its default changes nothing of a run that was begun before.
    saved |= {key: defaults[key] for key in now if key not in saved and key in defaults}
    differences = [
        f"  {key}: there {saved.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and not _of_the_arm(key).startswith(NOT_THE_EXPERIMENT)
    ]
    if differences:
        raise ValueError(
            f"{workdir} holds another experiment; its {CONFIG_FILE} differs:\n" + "\n".join(differences) + "\n"
            "Give a new --workdir, or repeat the settings of that one to resume it."
        )


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values (tuples become lists); `Settings.from_config` reads them."""
    return json.loads(json.dumps(settings.as_dict()))


def is_secret(key: str) -> bool:
    """Whether a dotted key names a seed of sampling or noise, of a config or of one of its arms.

    >>> is_secret("arms.noisy.privacy.noise_seed"), is_secret("seed")
    (True, False)
    """
    return re.fullmatch(r"(?:.*\.)?privacy\.(?:sampling|noise)_seed", key) is not None


def _of_the_arm(key: str) -> str:
    """The dotted key as an arm's own settings have it.

    >>> _of_the_arm("arms.noisy.train.eval_every"), _of_the_arm("train.eval_every")
    ('train.eval_every', 'train.eval_every')
    """
    return key.split(".", 2)[2] if key.startswith("arms.") and key.count(".") > 1 else key


def _gives_seeds(config: Mapping[str, Any]) -> bool:
    return any(is_secret(key) and value is not None for key, value in flatten(config).items())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries by dotted key; an empty one is a value.

    >>> flatten({"privacy": {"epsilon": 3.0}, "arms": {}})
    {'privacy.epsilon': 3.0, 'arms': {}}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, sub in tree.items():
        flat |= flatten(sub, f"{prefix}.{name}".strip("."))
    return flat
