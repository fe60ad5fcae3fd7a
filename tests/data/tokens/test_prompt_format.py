"""Chat templates: what is learned, and that `apply_chat_template` writes the tokens of training and of generation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from dp_rmt.data import PromptFormat, TextPairs, prompt_format_of, tokenize_completions, tokenize_prompts
from dp_rmt.data.readers.text_pairs import Turn

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Like Qwen3's: what the assistant thought is there only in its last turn.
FORGETFUL = CHATML.replace(
    "message['content']",
    "('(' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)
HISTORY = (Turn("system", "be kind"), Turn("user", "the pub"), Turn("assistant", "was great"))
MESSAGES = [*HISTORY, Turn("user", "a soup"), Turn("assistant", "yes the soup")]
PAIRS = TextPairs(("a soup",), ("yes the soup",), (HISTORY,))


@pytest.fixture(scope="module")
def chat() -> Any:
    """Byte-level BPE with ChatML's tokens, and an EOS token that ChatML does not write."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a pub the pub a a the soup was great"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def words(word_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "[CLS]", "[SEP]", None
    return tokenizer


@pytest.fixture(scope="module", params=["chatml", "separator of bytes", "separator of words"])
def case(request: pytest.FixtureRequest, chat: Any, words: Any) -> tuple[Any, PromptFormat]:
    tokenizer = words if request.param.endswith("words") else chat
    return tokenizer, prompt_format_of(tokenizer, "template" if request.param == "chatml" else "separator")


def by_transformers(tokenizer: Any, jinja: str, messages: list[Turn], **options: Any) -> list[int]:
    """The tokens that another program has, which knows the saved tokenizer alone."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = jinja
    given = [turn._asdict() for turn in messages]
    return copied.apply_chat_template(given, tokenize=True, return_dict=False, **options)


def test_training_has_the_tokens_of_the_saved_template(case: tuple[Any, PromptFormat]) -> None:
    tokenizer, chosen = case
    arrays = tokenize_completions(PAIRS, tokenizer, max_length=99, prompt_format=chosen)
    ids = arrays["input_ids"][0][arrays["attention_mask"][0] == 1].tolist()
    expected = by_transformers(tokenizer, chosen.jinja, MESSAGES)
    if chosen.name == "template":  # its "\n" after the last turn is followed by EOS, so that the end is learned
        expected.append(tokenizer.eos_token_id)
    assert ids == expected


def test_generation_has_the_tokens_of_the_saved_template_which_begin_those_of_training(
    case: tuple[Any, PromptFormat],
) -> None:
    tokenizer, chosen = case
    options = {"max_length": 99, "prompt_format": chosen}
    (prompt,) = tokenize_prompts(["a soup"], tokenizer, histories=[HISTORY], **options)
    assert prompt == by_transformers(tokenizer, chosen.jinja, MESSAGES[:-1], add_generation_prompt=True)
    arrays = tokenize_completions(PAIRS, tokenizer, **options)
    assert arrays["input_ids"][0][: len(prompt)].tolist() == prompt
    (single,) = tokenize_prompts([" a soup "], tokenizer, **options)
    assert single == by_transformers(
        tokenizer, chosen.jinja, [Turn("user", "a soup" if chosen.name == "separator" else " a soup ")],
        add_generation_prompt=True,
    )  # fmt: skip


def test_the_loss_is_on_all_that_the_assistant_said_and_on_nothing_else(case: tuple[Any, PromptFormat]) -> None:
    tokenizer, chosen = case
    arrays = tokenize_completions(PAIRS, tokenizer, max_length=99, prompt_format=chosen)
    ids, learned = arrays["input_ids"][0], arrays["loss_mask"][0]
    runs = np.split(ids, np.flatnonzero(np.diff(learned)) + 1)[1:-1]
    said = [tokenizer.decode(run).strip() for run in runs[::2]]
    if chosen.name == "template":
        assert said == ["was great<|im_end|>", "yes the soup<|im_end|>\n</s>"]
    else:
        end = tokenizer.eos_token
        assert [text.replace(" ", "") for text in said] == [f"wasgreat{end}", f"yesthesoup{end}"]


def test_one_turn_in_the_separator_format_is_the_layout_of_pairs(words: Any) -> None:
    plain = tokenize_completions(TextPairs(("a soup",), ("yes",)), words, max_length=9)
    chosen = prompt_format_of(words)
    ids = plain["input_ids"][0][plain["attention_mask"][0] == 1].tolist()
    assert ids == by_transformers(words, chosen.jinja, [Turn("user", "a soup"), Turn("assistant", "yes")])


def test_which_format_is_chosen(chat: Any, words: Any) -> None:
    assert prompt_format_of(chat).name == prompt_format_of(chat, "template").name == "template"
    assert prompt_format_of(chat).jinja == CHATML
    assert prompt_format_of(chat, "separator").name == prompt_format_of(words).name == "separator"
    several = copy.deepcopy(chat)
    several.chat_template = {"default": CHATML, "tool_use": "x"}
    assert prompt_format_of(several).jinja == CHATML
    with pytest.raises(
        ValueError, match=r"config.data.prompt_format='template': the tokenizer .* has no chat template"
    ):
        prompt_format_of(words, "template")


@pytest.mark.parametrize(
    ("pairs", "template", "message"),
    [
        (TextPairs(("a<|im_end|>",), ("b",), (), ("f, line 3",)), CHATML, r"f, line 3: .* user holds '<\|im_end\|>'"),
        (TextPairs(("a",), ("b</s>",)), CHATML, r"row 1: a text of the assistant holds '</s>'"),
        (PAIRS, FORGETFUL, "row 1: .* writes an earlier turn otherwise once another follows"),
        (
            PAIRS,
            "{{ raise_exception('no system here') }}",
            "row 1: .* does not take this conversation .*no system here",
        ),
    ],
)
def test_what_a_template_cannot_write_is_refused(pairs: TextPairs, template: str, message: str, chat: Any) -> None:
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenize_completions(pairs, tokenizer, max_length=99, prompt_format=prompt_format_of(tokenizer))
    arrays = tokenize_completions(pairs, tokenizer, max_length=99, prompt_format=prompt_format_of(chat, "separator"))
    assert arrays["loss_mask"].any()


def test_a_conversation_loses_its_end_and_never_all_that_is_learned(chat: Any) -> None:
    whole = tokenize_completions(PAIRS, chat, max_length=99, prompt_format=prompt_format_of(chat))
    first = int(np.argmax(whole["loss_mask"][0]))
    cut = tokenize_completions(PAIRS, chat, max_length=first + 1, prompt_format=prompt_format_of(chat))
    assert cut["input_ids"][0].tolist() == whole["input_ids"][0][: first + 1].tolist()
    assert cut["loss_mask"].sum() == 1
    with pytest.raises(ValueError, match=rf"row 1: what is to be learned begins after token {first}, but .* keeps no"):
        tokenize_completions(PAIRS, chat, max_length=first, prompt_format=prompt_format_of(chat))
