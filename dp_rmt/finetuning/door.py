"""The program as one function, for a notebook."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dp_rmt.data import Source, read_prompt, tokenize_prompts
from dp_rmt.data.readers.documents import tokenize_beginnings
from dp_rmt.files import explaining
from dp_rmt.finetuning import arms, assemble, command_line
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.shorthand import changed_by_name, is_in_memory, settings_from
from dp_rmt.finetuning.statements import privacy_record
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.finetuning.texts import decoding
from dp_rmt.finetuning.trained import read_trained
from dp_rmt.generation import generate_texts
from dp_rmt.reporting.privacy_files import write_privacy
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training import processes
from dp_rmt.training.metrics import read_metrics
from dp_rmt.types import Params


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A privately fine-tuned model, and what its run found.

    Attributes:
      params: all parameters, which may be released under the guarantee of `privacy`.
      privacy: the privacy statement, as `privacy.json` has it: epsilon, delta and what they rest on.
      settings: settings of the run.
      workdir: the run's folder, with its report, metrics and checkpoints; the checkpoints are as secret as the data.
      task: data and model.
    """

    params: Params
    privacy: Mapping[str, Any]
    settings: Settings
    workdir: Path
    task: Task

    @functools.cached_property
    def scores(self) -> Mapping[str, float]:
        """Scores on the evaluation data, such as ``{"dev/accuracy": 0.8}``; computed when they are first asked for.

        Where the evaluation data is private (`privacy.evaluation_epsilon`) they are those that the run released last.
        """
        if self.settings.privacy.evaluation_epsilon is not None:
            lines = read_metrics(self.workdir / "metrics.jsonl")
            last = {name: value for line in lines for name, value in line.items() if name.startswith("eval/")}
            return {name.removeprefix("eval/"): value for name, value in last.items()}
        evaluators = assemble.evaluators(self.settings, self.task)
        return {
            f"{name}/{metric}": value
            for name, evaluate in evaluators.items()
            for metric, value in evaluate(self.params).items()
        }

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

    def predict_rows(self, rows: Sequence[Sequence[str]]) -> list[str] | list[float]:
        """`predict` of rows of one text, or of two for a task of pairs.

        Raises:
          ValueError: the task is not classification, or a row has another number of texts.
        """
        columns = 2 if self._classifier().is_of_pairs else 1
        for number, row in enumerate(rows, start=1):
            if len(row) != columns:
                raise ValueError(
                    f"row {number} has {len(row)} texts and not {columns}, as the task was trained on; it begins "
                    f"{row[0][:60]!r}"
                )
        texts = list(zip(*rows, strict=True)) or [()] * columns
        return self.predict(texts[0], texts[1] if columns == 2 else None)

    def logits(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> np.ndarray:
        """Unnormalised log probabilities, (N, number of classes); arguments and errors as in `predict`."""
        return self._classifier()(self.params, texts, text_pairs)

    def generate(self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], **changes: Any) -> list[str]:
        """The text that the model writes for every prompt.

        Args:
          prompts: sources of the kind that was trained on, or conversations so far, as lists of messages.
          **changes: changes to `settings.generation`, such as ``method="sampling"``.

        Raises:
          ValueError: the model is no decoder, a change is unknown, or a prompt is too long.
        """
        if self.settings.model.head != "causal_lm":
            raise ValueError(f"a model with the head {self.settings.model.head!r} writes no text; use predict")
        generation = self.settings.changed({"generation": changes}).generation
        room = self.task.module.config.max_position_embeddings - generation.max_new_tokens
        tokenizer, written_as = self.task.tokenizer, self.task.prompt_format
        if written_as is None:  # texts were trained on as they are, and the model goes on with one
            texts_alone = [prompt for prompt in prompts if isinstance(prompt, str)]
            if len(texts_alone) < len(prompts):
                raise ValueError("a model of documents goes on with a text, and answers no conversation; give texts")
            token_ids = tokenize_beginnings(texts_alone, tokenizer)
        else:
            records = [read_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
            token_ids = tokenize_prompts(
                [record.source for record in records],
                tokenizer,
                max_length=room,
                prompt_format=written_as,
                histories=[record.history for record in records],
            )
        written = generate_texts(
            self.task.module,
            self.params,
            tokenizer,
            token_ids,
            decoding(generation),
            batch_size=generation.batch_size,
            prompt_lengths=generation.prompt_lengths,
        )
        texts = dict(written)
        return [texts[row].strip() for row in range(len(prompts))]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copies what may be released: the model in Hugging Face layout, and the privacy statement beside it.

        Args:
          folder: a new folder. It gets what `model/` has (weights, tokenizer, model card), and ``privacy.json`` and
            ``privacy.md`` without the command and the folders of this machine.

        Raises:
          FileExistsError: the folder is there already.
        """
        shutil.copytree(self.workdir / "model", folder)
        write_privacy(folder, PrivacyStatement.from_json(privacy_record(self.workdir)))

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


def load_finetuned(workdir: str | os.PathLike[str], arm: str | None = None, **changes: Any) -> Finetuned:
    """The model of a run that was trained before, or stopped, from its folder or a copy of it; nothing is trained.

    Args:
      workdir: the folder that `finetune` or the program was given.
      arm: name of one of its arms; may be left out if there is only one.
      **changes: settings to ask it with, named as in `finetune`: other data, generation or evaluation.

    Raises:
      FileNotFoundError: nothing has been trained there.
      ValueError: there is no such arm, or a change is of what training fixed.
      BlockingIOError: the run is training at this moment.
    """
    return asked_again(Path(workdir), arm, lambda settings: changed_by_name(settings, changes))


def asked_again(workdir: Path, arm: str | None, change: Callable[[Settings], Settings]) -> Finetuned:
    """`load_finetuned` with a function that makes the settings to ask with from those of the run."""
    logging.get_absl_logger().addFilter(command_line.is_of_interest)
    found = read_trained(workdir, arm, change)
    return Finetuned(found.params, read_privacy(found.workdir), found.settings, found.workdir, found.task)


def _finetuned(arm: arms.Arm) -> Finetuned:
    params = processes.to_host(arm.run.published_params(arms.trained_state(arm)))
    return Finetuned(params, read_privacy(arm.workdir), arm.settings, arm.workdir, arm.task)
