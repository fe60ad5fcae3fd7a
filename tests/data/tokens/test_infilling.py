"""The prompt survives every truncation; the mask is at `mask_position`; label words are single tokens."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_rmt.data import Examples, Infilling, get_task, label_word_ids, tokenize_classification

SST2 = get_task("sst2").infilling
MNLI = get_task("mnli").infilling


def rows(examples, tokenizer, infilling, max_length):
    arrays = tokenize_classification(examples, tokenizer, max_length=max_length, infilling=infilling)
    assert arrays["mask_position"].dtype == np.int32
    at_mask = arrays["input_ids"][np.arange(len(examples)), arrays["mask_position"]]
    assert (at_mask == tokenizer.mask_token_id).all()
    assert ((arrays["input_ids"] == tokenizer.mask_token_id).sum(axis=1) == 1).all()
    assert not arrays["token_type_ids"].any()
    is_token = arrays["attention_mask"] == 1
    return [tokenizer.convert_ids_to_tokens(ids[keep]) for ids, keep in zip(arrays["input_ids"], is_token)]


def test_one_text(word_tokenizer):
    examples = Examples(("the film", "a b c d e f g h"), None, np.zeros(2, np.int32))
    whole, cut = rows(examples, word_tokenizer, SST2, 10)
    assert " ".join(whole) == "[CLS] the film it was [MASK] . [SEP]"
    assert " ".join(cut) == "[CLS] a b c d it was [MASK] . [SEP]"


def test_two_texts(word_tokenizer):
    examples = Examples(("a b", "a b c d e", "a"), ("c d", "f", "b c d e f"), np.zeros(3, np.int32))
    whole, first_cut, second_cut = rows(examples, word_tokenizer, MNLI, 9)
    assert " ".join(whole) == "[CLS] a b ? [MASK] , c d [SEP]"
    assert " ".join(first_cut) == "[CLS] a b c ? [MASK] , f [SEP]"
    assert " ".join(second_cut) == "[CLS] a ? [MASK] , b c d [SEP]"


def test_spaces_of_a_byte_level_vocabulary(byte_tokenizer):
    """No space before the first text and before the mask, one before the second text."""
    [row] = rows(Examples(("it was",), None, None), byte_tokenizer, SST2, 32)
    assert byte_tokenizer.convert_tokens_to_string(row) == "<s>it was It was<mask>.</s>"
    [row] = rows(Examples(("it",), ("it was",), None), byte_tokenizer, MNLI, 32)
    assert byte_tokenizer.convert_tokens_to_string(row) == "<s>it?<mask>, it was</s>"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(8, 24))
def test_any_lengths(word_tokenizer, num_first, num_second, max_length):
    """Rows are as long as they may be, and a text is cut only when the row is full, the longer text first."""
    first, second = ("a " * (num_first + 1)).strip(), ("b " * (num_second + 1)).strip()
    [row] = rows(Examples((first,), (second,), None), word_tokenizer, MNLI, max_length)
    room = max_length - 5  # [CLS] ? [MASK] , [SEP]
    kept, kept_second = row.count("a"), row.count("b")
    assert kept + kept_second == min(num_first + num_second + 2, room)
    if kept < num_first + 1:
        assert kept >= kept_second - 1
    if kept_second < num_second + 1:
        assert kept_second >= kept - 1


def test_label_words_are_tokens_after_a_space(word_tokenizer, byte_tokenizer):
    ids = label_word_ids(word_tokenizer, SST2)
    assert ids.dtype == np.int32
    assert word_tokenizer.convert_ids_to_tokens(ids) == ["terrible", "great"]
    ids = label_word_ids(byte_tokenizer, SST2)
    assert byte_tokenizer.convert_ids_to_tokens(ids) == ["Ġterrible", "Ġgreat"]


def test_label_words_that_do_not_do(word_tokenizer, byte_tokenizer):
    with pytest.raises(ValueError, match=r"label word 'Maybe' must be one token .* but is \['Ġ', 'M', "):
        label_word_ids(byte_tokenizer, Infilling("<S> <mask>", ("great", "Maybe")))
    with pytest.raises(ValueError, match=r"label word 'horrid' must be one token .* but is \['\[UNK\]'\]"):
        label_word_ids(word_tokenizer, Infilling("<S> <mask>", ("great", "horrid")))
    with pytest.raises(ValueError, match=r"label word 'Great' is the same token as 'great'"):
        label_word_ids(word_tokenizer, Infilling("<S> <mask>", ("great", "Great")))


def test_prompts_that_do_not_fit(word_tokenizer, byte_tokenizer):
    one, two = Examples(("a",), None, None), Examples(("a",), ("b",), None)
    with pytest.raises(ValueError, match=r"no room for text: the prompt '<S> It was <mask>\.' .* 6 tokens"):
        rows(one, word_tokenizer, SST2, 6)
    with pytest.raises(ValueError, match="no room for text"):
        rows(two, word_tokenizer, MNLI, 6)
    with pytest.raises(ValueError, match=r"must hold each of <S>, <mask> once"):
        rows(one, word_tokenizer, MNLI, 16)
    with pytest.raises(ValueError, match=r"must hold each of <S1>, <S2>, <mask> once"):
        rows(two, word_tokenizer, Infilling("<S1> <mask>", ("great", "terrible")), 16)


def test_a_tokenizer_without_mask_token(byte_tokenizer):
    causal = copy.deepcopy(byte_tokenizer)
    causal.mask_token = None
    with pytest.raises(ValueError, match="has no mask token, which text infilling needs"):
        tokenize_classification(Examples(("a",), None, None), causal, max_length=16, infilling=SST2)
