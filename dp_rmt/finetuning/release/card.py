"""The card of an arm's model: what of its settings, scores and statement may be published, and how it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dp_rmt.data import get_task
from dp_rmt.finetuning.data_settings import PUBLISHED_TASKS
from dp_rmt.finetuning.release.base_model import BaseModel
from dp_rmt.finetuning.release.public_command import public_command
from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.reporting.model_card import ModelCard, card_text
from dp_rmt.reporting.privacy_statement import PrivacyStatement, read_privacy
from dp_rmt.training.metrics import read_metrics

Kind = Literal["model", "adapter"]
KINDS: tuple[Kind, ...] = ("model", "adapter")
PIPELINES = {
    "classification": "text-classification",
    "infilling": "fill-mask",
    "causal_lm": "text-generation",
}
_HUB_NAMES = {"e2e": "E2E NLG", "dart": "DART"}
_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "infilling": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}


def card_of(workdir: Path, settings: Settings, task: Task, base: BaseModel, kind: Kind) -> str:
    """The text of the `README.md` beside a saved model or adapter.

    Args:
      workdir: the arm's folder, with its statement and metrics.
      settings: of the arm.
      task: its task.
      base: what may be said of the pre-trained model.
      kind: which of the two is saved.
    """
    statement = PrivacyStatement.from_json(read_privacy(workdir))
    if settings.whitening.text is not None and statement.coordinates_from is not None:
        statement = dataclasses.replace(statement, coordinates_from="a file of public text")  # without its path
    head, data_name = settings.model.head, public_data_name(settings)
    title = f"{base.name.rpartition('/')[2]}, fine-tuned"
    private = f"{title} with differential privacy" if statement.is_private else f"{title} WITHOUT privacy"
    return card_text(
        ModelCard(
            title=private,
            statement=statement,
            base_model=base.name,
            hub_name=base.hub_name,
            pipeline_tag=PIPELINES[head],
            library="transformers" if kind == "model" else "peft",
            usage=tuple(_usage(settings, task, base, kind)),
            command=public_command(settings, base.hub_name),
            tuning=settings.model.tuning,
            licence=base.licence,
            languages=base.languages,
            data_name=data_name,
            scores=public_scores(settings, read_metrics(workdir / "metrics.jsonl")),
        )
    )


def public_data_name(settings: Settings) -> str | None:
    """The name of the data, if it has one that may be published."""
    if settings.release.data_name is not None or not is_published(settings):
        return settings.release.data_name
    if settings.synthetic is not None:
        return "generated reviews"
    return _HUB_NAMES.get(settings.data.task, f"glue/{settings.data.task}")


def is_published(settings: Settings) -> bool:
    """Whether all data of a run are known to be public: published tasks from the hub, and what the project generates.

    Of a path, of hub:NAME (which may be somebody's own) and of rows from Python nothing is known.
    """
    data = settings.data
    is_from_hub = data.path is None and data.task in PUBLISHED_TASKS
    return settings.synthetic is not None or is_from_hub


def public_scores(settings: Settings, lines: list[dict[str, Any]]) -> Mapping[str, float]:
    """The last scores on each public evaluation, ``"split/metric" -> value``.

    Those of a private run are the ones on data that are public (`is_published`), or on the splits that
    `config.release.public_evaluations` names.
    """
    all_public = is_published(settings)
    found: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            split = name.removeprefix("eval/").partition("/")[0]
            is_public = all_public or split in settings.release.public_evaluations
            if name.startswith("eval/") and is_public and isinstance(value, float):
                found[name.removeprefix("eval/")] = value
    return found


def _usage(settings: Settings, task: Task, base: BaseModel, kind: Kind) -> list[str]:
    """Paragraphs of Markdown: how a program gives the model its texts."""
    head = settings.model.head
    if kind == "model":
        opened = f'pipe = pipeline("{PIPELINES[head]}", model="FOLDER")'
        lines = ["from transformers import pipeline", "", opened]
    else:
        labels = f", num_labels={task.num_labels or 1}" if head == "classification" else ""
        lines = ["from peft import PeftModel", f"from transformers import AutoTokenizer, {_CLASSES[head]}, pipeline"]
        lines += ["", f'base = {_CLASSES[head]}.from_pretrained("{base.hub_name or "BASE MODEL"}"{labels})']
        lines += ['model = PeftModel.from_pretrained(base, "FOLDER").merge_and_unload()']
        lines += [
            f'pipe = pipeline("{PIPELINES[head]}", model=model, tokenizer=AutoTokenizer.from_pretrained("FOLDER"))'
        ]
    describe = {"classification": _classification, "infilling": _infilling, "causal_lm": _generation}[head]
    call, paragraphs = describe(settings, task)
    return ["```python\n" + "\n".join([*lines, *call]) + "\n```", *paragraphs]


def _classification(settings: Settings, task: Task) -> tuple[list[str], list[str]]:
    data = settings.data
    columns = data.text_columns if data.task == "labelled_table" else get_task(data.task).text_columns
    text = '"a text"' if len(columns) == 1 else '{"text": "a text", "text_pair": "another"}'
    what = f"one of {', '.join(f'`{name}`' for name in task.label_names)}" if task.label_names else "a score"
    return [f"print(pipe({text}, truncation=True))"], [
        f"The answer is {what}. Training and scores cut texts at {data.max_length} tokens, as `truncation=True` does."
    ]


def _infilling(settings: Settings, task: Task) -> tuple[list[str], list[str]]:
    infilling = get_task(settings.data.task).infilling
    assert infilling is not None
    asked = infilling.template.replace("<mask>", task.tokenizer.mask_token)
    words = [f" {word}" for word in infilling.label_words]
    classes = ", ".join(
        f"`{word}` for {name}" for word, name in zip(infilling.label_words, get_task(settings.data.task).label_names)
    )
    texts = asked.replace("<S1>", "a text").replace("<S2>", "another").replace("<S>", "a text")
    return [f"print(pipe({texts!r}, targets={words}))"], [
        f"The prompt is `{asked}`, and the likeliest of these words at the mask is the class: {classes}."
    ]


def _generation(settings: Settings, task: Task) -> tuple[list[str], list[str]]:
    written, tokenizer = task.prompt_format, task.tokenizer
    if written is None:
        start = tokenizer.bos_token or tokenizer.eos_token or ""
        call = f'print(pipe({start!r} + "a text\'s beginning", add_special_tokens=False))'
        return [call], [f"The model was trained on texts as they are, each after `{start}`; it goes on with a text."]
    messages = [{"role": "user", "content": "SOURCE"}]
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=written.jinja, tokenize=False, add_generation_prompt=True
    )
    lines = ['messages = [{"role": "user", "content": "SOURCE"}]', 'print(pipe(messages)[0]["generated_text"][-1])']
    paragraphs = [
        "The chat template in `tokenizer_config.json` writes the prompts that the model was trained on. For SOURCE it "
        f"gives `{prompt!r}` (in Python's notation), and a text ends with `{tokenizer.eos_token}`.",
        f"`generation_config.json` has the decoding of the run: {_decoding(settings)}.",
    ]
    return lines, paragraphs


def _decoding(settings: Settings) -> str:
    generation = settings.generation
    if generation.method == "beam":
        return f"{generation.num_beams} beams. vLLM takes no beams from it"
    if generation.method == "sampling":
        return f"sampling at temperature {generation.temperature:g}"
    return f"greedy. vLLM must be told: `SamplingParams(temperature=0, max_tokens={generation.max_new_tokens})`"
