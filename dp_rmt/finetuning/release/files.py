"""The files beside a saved model's weights that say how it is used: tokenizer and `generation_config.json`."""

from __future__ import annotations

import copy
import json
from typing import Any

from dp_rmt.finetuning.settings import Settings
from dp_rmt.finetuning.tasks.task import Task
from dp_rmt.finetuning.texts import decoding
from dp_rmt.generation import Beam, Sampling

GENERATION_CONFIG = "generation_config.json"


def released_tokenizer(settings: Settings, task: Task, name: str) -> Any:
    """A copy of the tokenizer that writes prompts, and cuts texts, as the run did.

    Args:
      settings: of the arm.
      task: its task.
      name: public name of the pre-trained model; a tokenizer remembers where it was read.
    """
    tokenizer = copy.deepcopy(task.tokenizer)
    tokenizer.name_or_path = name
    if task.prompt_format is not None:
        tokenizer.chat_template = task.prompt_format.jinja
    is_decoder = settings.model.head == "causal_lm"
    tokenizer.model_max_length = task.module.config.max_position_embeddings if is_decoder else settings.data.max_length
    return tokenizer


def generation_config(settings: Settings, task: Task) -> dict[str, str]:
    """`generation_config.json` with its content; nothing for a model that writes no text.

    The names are those of `transformers.GenerationConfig`, some of which vLLM reads, too.
    """
    if settings.model.head != "causal_lm":
        return {}
    method, tokenizer = decoding(settings.generation), task.tokenizer
    end = tokenizer.eos_token_id
    found: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "max_new_tokens": method.max_new_tokens,
        "no_repeat_ngram_size": method.no_repeat_ngram_size or None,
        "do_sample": isinstance(method, Sampling),
    }
    if isinstance(method, Beam):
        found |= {
            "num_beams": method.num_beams,
            "length_penalty": method.length_penalty,
            "early_stopping": method.early_stopping,
        }
    if isinstance(method, Sampling):
        found |= {"temperature": method.temperature, "top_k": method.top_k, "top_p": method.top_p}
    content = {key: value for key, value in found.items() if value is not None}
    return {GENERATION_CONFIG: json.dumps(content, indent=2) + "\n"}
