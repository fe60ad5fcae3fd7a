"""The model card: what a released model is, what its guarantee rests on, and how it is used.

A card is published, so that nothing private may reach it: its caller gives public names only, and scores on public data
only. The words on privacy are those of the statement, without what speaks of the run's folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dp_rmt.extras import extra
from dp_rmt.reporting.numbers import number
from dp_rmt.reporting.privacy_statement import PrivacyStatement, table_rows
from dp_rmt.reporting.privacy_text import RELEASE, sections
from dp_rmt.reporting.provenance import version

with extra("finetune"):
    from huggingface_hub import EvalResult, ModelCardData

FILE = "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says; every text here will be published.

    Attributes:
      title: name of the model.
      statement: the run's privacy statement.
      base_model: public name of the pre-trained model.
      hub_name: its name on the hub; None if it is not known to be there.
      pipeline_tag: the hub's name of what the model does, such as "text-classification".
      library: the library that opens the folder, "transformers" or "peft".
      usage: paragraphs of Markdown: how a program gives the model its texts.
      command: a command that trains such a model.
      tuning: which part of the model was trained.
      licence: fields of the header about the licence, such as ``{"license": "mit"}``; empty if it is not known.
      languages: codes such as "en".
      data_name: public name of the data; None if it has none.
      scores: ``"split/metric" -> value``, on public data.
    """

    title: str
    statement: PrivacyStatement
    base_model: str
    hub_name: str | None
    pipeline_tag: str
    library: str
    usage: tuple[str, ...]
    command: str
    tuning: str
    licence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    languages: tuple[str, ...] = ()
    data_name: str | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


def card_text(card: ModelCard) -> str:
    """The card as the content of a model folder's `README.md`: the hub's YAML header, then Markdown."""
    statement = dataclasses.replace(card.statement, about=None, texts_of=None)
    parts = [f"---\n{_header(card)}\n---", f"# {card.title}", _summary(card)]
    parts += ["## How to use it", *card.usage]
    for heading, paragraphs in sections(statement):
        if heading != RELEASE:  # of other files than the model's
            parts += [f"## {heading}", "\n".join(f"- {text}" for text in paragraphs)]
    if card.scores:
        rows = [f"| {name} | {value:.4f} |" for name, value in sorted(card.scores.items())]
        data = f" ({card.data_name})" if card.data_name else ""
        parts += ["## Scores", "\n".join([f"| score{data} | value |\n|:--|--:|", *rows])]
    numbers = [f"| {name} | {value} |" for name, value in table_rows(statement)]
    parts += ["## Numbers", "\n".join(["| quantity | value |\n|:--|--:|", *numbers])]
    parts += ["## How it was trained", _training(card)]
    return "\n\n".join(parts) + "\n"


def _header(card: ModelCard) -> str:
    """The hub's fields as YAML."""
    tags = ["dp_rmt", *(["differential-privacy", "dp-sgd"] if card.statement.is_private else [])]
    fields: dict[str, Any] = {
        "base_model": card.hub_name,
        "language": list(card.languages) or None,
        "library_name": card.library,
        "pipeline_tag": card.pipeline_tag,
        "tags": tags,
        **card.licence,
    }
    if card.scores:
        fields |= {"model_name": card.title, "eval_results": [_result(card, *score) for score in card.scores.items()]}
    return ModelCardData(**fields).to_yaml()


def _result(card: ModelCard, name: str, value: float) -> EvalResult:
    split, _, metric = name.rpartition("/")
    data = card.data_name or split
    return EvalResult(
        task_type=card.pipeline_tag,
        dataset_type=re.sub(r"[^\w./-]+", "-", data).lower(),
        dataset_name=data,
        dataset_split=split,
        metric_type=metric,
        metric_value=round(value, 6),
    )


def _summary(card: ModelCard) -> str:
    base = f"[`{card.hub_name}`](https://huggingface.co/{card.hub_name})" if card.hub_name else f"`{card.base_model}`"
    data = f" of {card.data_name}" if card.data_name else ""
    what = "Low-rank updates (a PEFT adapter) of" if card.library == "peft" else "A fine-tuned copy of"
    statement = card.statement
    about = f"{what} {base}, trained (`{card.tuning}`) on {statement.num_examples:,} {statement.unit}s{data}"
    by = f"by dp_rmt {version() or ''}".rstrip()
    if not statement.is_private:
        return f"{about} {by}, **without any privacy guarantee**."
    epsilon, delta = float(statement.epsilon or 0.0), float(statement.delta or 0.0)
    accountant = "Rényi divergences" if epsilon == statement.epsilon_rdp else "privacy loss distributions"
    bound = "at most " if statement.is_upper_bound else ""
    return (
        f"{about} with differential privacy {by}: {bound}**ε = {number(epsilon, 'up')} at δ = {number(delta, 'up')}**. "
        f"The unit is {statement.unit_in_words} (add or remove one), the sampler Poisson, the accountant {accountant}."
    )


def _training(card: ModelCard) -> str:
    return (
        "Words in capitals stand for what is not published, such as the place of the data. A run draws seeds of its "
        f"own, so that another gives another model.\n\n```sh\n{card.command}\n```"
    )
