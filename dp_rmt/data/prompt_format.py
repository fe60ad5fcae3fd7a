"""How prompt and answer are put together: the one place that training, generation and the saved tokenizer ask.

Two formats have names. "template" is the tokenizer's own chat template. "separator" is the default of a tokenizer
without one, and the layout of Li et al. 2022 (arXiv 2110.05679) for E2E and DART:

    [BOS]  source  separator | target  EOS  [source  separator | target  EOS ...]

It has a Jinja text, too, which goes into the saved tokenizer, so that any program that calls `apply_chat_template`
writes the prompts that the model was trained on.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from dp_rmt.data.tokens.token_rows import check_is_fast

Wanted = Literal["auto", "template", "separator"]


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The way in which a run writes its prompts.

    Attributes:
      name: "template" (the tokenizer's own chat template) or "separator".
      jinja: the chat template that writes these prompts: what belongs into the saved tokenizer's ``chat_template``.
      layout: the tokens around source and target.
    """

    name: Literal["template", "separator"]
    jinja: str
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens around source and target.

    Attributes:
        start: BOS, or nothing.
        separator: the tokens between source and target.
        end: the EOS token.
        pad: the padding token.
        lead: what is put before a text, so that its first word is the token of a word inside a text.
    """

    start: tuple[int, ...]
    separator: tuple[int, ...]
    end: int
    pad: int
    lead: str


def prompt_format_of(tokenizer: Any, wanted: Wanted = "auto", *, separator: str | None = None) -> PromptFormat:
    """The format of a run with this tokenizer.

    Args:
      tokenizer: a fast tokenizer of `transformers` with an EOS token. If it has no pad token, EOS pads.
      wanted: "template", "separator", or "auto": the tokenizer's template if it has one, and otherwise the separator.
      separator: text between source and target, such as "\\n"; None is the BOS token, or EOS if there is no BOS.

    Returns:
      The format.

    Raises:
      ValueError: the tokenizer is slow, has no EOS token, or has no template where one is wanted.
    """
    layout = _layout(tokenizer, separator)
    own = tokenizer.chat_template
    if isinstance(own, dict):  # some models have several templates by name
        own = own.get("default")
    if wanted == "template" and not own:
        raise ValueError(
            f"config.data.prompt_format='template': the tokenizer {tokenizer.name_or_path!r} has no chat template. "
            "Take 'separator' or 'auto', or the tokenizer of the model's instruction-tuned version"
        )
    if own and wanted != "separator":
        return PromptFormat("template", own, layout)
    return PromptFormat("separator", _jinja(tokenizer, layout, separator), layout)


def _layout(tokenizer: Any, separator: str | None) -> Layout:
    check_is_fast(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so the end of a text cannot be learned. Set"
            " one: tokenizer.eos_token = ..."
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if separator is None:
        between = [eos if bos is None else bos]
    else:
        between = tokenizer(separator, add_special_tokens=False)["input_ids"]
        if not between:
            raise ValueError(f"The separator {separator!r} has no tokens. Choose another text, or None.")
    # "a a" is twice the same token if words carry their own mark (Llama's "▁a", whole words). If the space is part of
    # the token (GPT-2's "a", "Ġa"), a leading space gives the first word its usual token.
    word = tokenizer("a a", add_special_tokens=False)["input_ids"]
    return Layout(
        start=(bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else (),
        separator=tuple(between),
        end=eos,
        pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        lead="" if word[0] == word[-1] else " ",
    )


def _jinja(tokenizer: Any, layout: Layout, separator: str | None) -> str:
    """The layout as a chat template; the text of the system is the beginning of the user's."""
    start = "{{- bos_token }}" if layout.start else ""
    if separator is None:
        between = "eos_token" if tokenizer.bos_token_id is None else "bos_token"
    else:
        between = json.dumps(separator)
    return (
        start
        + "{%- for message in messages %}"
        + "{%- set after_system = loop.index0 > 0 and messages[loop.index0 - 1]['role'] == 'system' %}"
        + f"{{{{- ('' if after_system else {json.dumps(layout.lead)}) + message['content'] | trim }}}}"
        + "{%- if message['role'] == 'system' %}{{- '\\n\\n' }}"
        + "{%- elif message['role'] == 'assistant' %}{{- eos_token }}"
        + f"{{%- else %}}{{{{- {between} }}}}"
        + "{%- endif %}{%- endfor %}"
    )
