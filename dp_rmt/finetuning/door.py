"""The program as one function, for a notebook."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data import Source, tokenize_prompts
from dp_rmt.files import explaining
from dp_rmt.finetuning import arms, command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.shorthand import is_in_memory, settings_from
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.finetuning.texts import decoding
from dp_rmt.finetuning.workdir import CONFIG_FILE
from dp_rmt.generation import generate_texts
from dp_rmt.reporting.privacy_statement import read_privacy
from dp_rmt.training import processes
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A privately fine-tuned model, and what its run found.

    Attributes:
      params: all parameters, which may be released under the guarantee of `privacy`.
      scores: scores on the evaluation data at the end, such as ``{"dev/accuracy": 0.8}``.
      privacy: the privacy statement, as `privacy.json` has it: epsilon, delta and what they rest on.
      settings: settings of the run.
      workdir: the run's folder, with its report, metrics and checkpoints; the checkpoints are as secret as the data.
      task: data and model.
    """

    params: Params
    scores: Mapping[str, float]
    privacy: Mapping[str, Any]
    settings: Settings
    workdir: Path
    task: Task

    def predict(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> list[str] | list[float]:
        """The name of every text's class, or its score where the task is regression.

        Args:
          texts: texts to classify.
          text_pairs: the second texts, for a task of pairs.

        Raises:
          ValueError: the task is not classification, or the logits of a text are not numbers.
        """
        logits = self.logits(texts, text_pairs)
        wrong = np.flatnonzero(np.isnan(logits).any(axis=1))
        if wrong.size:
            raise ValueError(
                f"the logits of {wrong.size} of {len(logits)} texts are NaN, the first at place {wrong[0]} (counted "
                "from 0), so that they have no class; the model has diverged, or its config.model.dtype is too narrow"
            )
        names = self._classifier().names
        if not names:
            return [float(score) for score in logits[:, 0]]
        return [names[number] for number in logits.argmax(axis=1)]

    def logits(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> np.ndarray:
        """Unnormalised log probabilities, (N, number of classes); arguments and errors as in `predict`."""
        return self._classifier()(self.params, texts, text_pairs)

    def generate(self, prompts: Sequence[str], **changes: Any) -> list[str]:
        """The text that the model writes for every prompt.

        Args:
          prompts: sources of the kind that was trained on.
          **changes: changes to `settings.generation`, such as ``method="sampling"``.

        Raises:
          ValueError: the model is no decoder, a change is unknown, or a prompt is too long.
        """
        if self.settings.model.head != "causal_lm":
            raise ValueError(f"a model with the head {self.settings.model.head!r} writes no text; use predict")
        generation = self.settings.changed({"generation": changes}).generation
        room = self.task.module.config.max_position_embeddings - generation.max_new_tokens
        written = generate_texts(
            self.task.module,
            self.params,
            self.task.tokenizer,
            tokenize_prompts(prompts, self.task.tokenizer, max_length=room, prompt_format=self.task.prompt_format),
            decoding(generation),
            batch_size=generation.batch_size,
            prompt_lengths=generation.prompt_lengths,
        )
        texts = dict(written)
        return [texts[row].strip() for row in range(len(prompts))]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copies what may be released: the model in Hugging Face layout, and the privacy statement beside it.

        Args:
          folder: a new folder. It gets ``config.json``, ``model.safetensors``, the tokenizer, ``privacy.json`` and
            ``privacy.md``.

        Raises:
          FileExistsError: the folder is there already.
        """
        shutil.copytree(self.workdir / "model", folder)
        for name in ("privacy.json", "privacy.md"):
            shutil.copy(self.workdir / name, folder)

    def _classifier(self) -> Any:
        if self.task.classifier is None:
            raise ValueError(f"config.data.task={self.settings.data.task!r} does not classify; use generate")
        return self.task.classifier


def finetune(
    *,
    model: str,
    train: Source,
    epsilon: float,
    workdir: str | os.PathLike[str],
    **settings: Any,
) -> Finetuned:
    """Fine-tunes a model on private data: the main job of this library as a function.

    Formal guarantee: `Finetuned.params` is (epsilon, delta)-differentially private for neighbours that differ by one
    row of the training data, as the statement `Finetuned.privacy` says in full. The checkpoints, the ledger and the
    metrics named ``nonprivate/...`` in the workdir must stay secret.

    Args:
      model: folder, name on the hub, or package:NAME/FOLDER of an installed package.
      train: a file of rows (CSV, TSV, JSON, JSON Lines, Parquet): labelled text with the columns ``text`` and ``label``
        unless `text_columns` and `label_column` say otherwise, prompts and answers, or conversations; a folder with
        such files named train, and perhaps dev and test; a folder of .txt files; hub:NAME; a `datasets.Dataset`, a list
        of dictionaries, or a dictionary of such by split; the name of a task such as "sst2"; or the folder of a task
        that `data` names, as in ``data={"task": "e2e"}``.
      epsilon: the privacy budget; `math.inf` trains without privacy.
      workdir: the run's folder. A call with the same settings resumes the run there, or reads it if it is finished.
      **settings: any other settings by name, such as ``num_steps=200, l2_clip_norm=0.5, denoise=()``. A name is nested,
        as in ``data={"max_length": 32}``; dotted, as in ``**{"train.schedule": "constant"}``; or the last part of a
        dotted name, if only one setting has it. ``dp-rmt finetune --help`` lists them.

    Returns:
      A `Finetuned`.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: the message says what is wrong, where, and what to do.
    """
    train = os.fspath(train) if isinstance(train, os.PathLike) else train
    rows = train if is_in_memory(train) else None
    return finetune_with(settings_from(model, train, epsilon, settings), Path(workdir), rows)


def finetune_with(settings: Settings, workdir: Path, rows: Any = None) -> Finetuned:
    """`finetune` with a whole `Settings`.

    Args:
      settings: settings of one run, with one arm at most.
      workdir: the run's folder.
      rows: one's own rows that a program holds, in the place of `data.path`.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: as in `finetune`.
    """
    if len(settings.arms) > 1:
        raise ValueError("config.arms: a call fine-tunes one model; call once for each arm, or use `dp-rmt finetune`")
    logging.get_absl_logger().addFilter(command_line.is_of_interest)
    with explaining():
        (arm,) = arms.prepare(settings, workdir, rows)
        arms.train(arm)
        arms.report(workdir)
    return _finetuned(arm)


def load_finetuned(workdir: str | os.PathLike[str], arm: str | None = None) -> Finetuned:
    """The model of a run that was trained before, from its folder.

    Args:
      workdir: the folder that `finetune` or the program was given.
      arm: name of one of its arms; may be left out if there is only one.

    Raises:
      FileNotFoundError: nothing has been trained there.
      ValueError, FileExistsError: there is no such arm, or the run's data or model is no longer what it was.
    """
    workdir = Path(workdir)
    config = workdir / CONFIG_FILE
    if not config.exists():
        raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: give the folder of a run")
    settings = Settings.from_config(json.loads(config.read_text()))
    prepared = {each.name: each for each in arms.prepare(settings, workdir, shows_plan=False)}
    name = next(iter(prepared)) if arm is None and len(prepared) == 1 else arm
    if name not in prepared:
        raise ValueError(f"{workdir} has the arms {', '.join(prepared)}: name one of them")
    return _finetuned(prepared[name])


def _finetuned(arm: arms.Arm) -> Finetuned:
    state = arms.trained_state(arm)
    params = processes.to_host(arm.run.published_params(state))
    scores = {
        f"{name}/{metric}": value
        for name, evaluate in arm.run.loop.evaluators.items()
        for metric, value in evaluate(params).items()
    }
    return Finetuned(params, scores, read_privacy(arm.workdir), arm.settings, arm.workdir, arm.task)
