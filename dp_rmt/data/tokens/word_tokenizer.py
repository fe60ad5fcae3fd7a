"""A word-level tokenizer in Hugging Face layout, trained on the synthetic reviews."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from dp_rmt.extras import extra

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_word_tokenizer(texts: Iterable[str], folder: str | os.PathLike[str], *, min_frequency: int = 1):
    """Makes every word of `texts` a token, and saves a folder that `transformers.AutoTokenizer` loads.

    The vocabulary is a function of the texts. Train it on public text only, or it reveals private words.

    Args:
        texts: lower-case text, split at whitespace and punctuation.
        folder: where the tokenizer is saved; it is made if needed.
        min_frequency: words that are rarer become [UNK].

    Returns:
        The `transformers.PreTrainedTokenizerFast`, with `[CLS] x [SEP]`, or `[CLS] x [SEP] y [SEP]` for pairs. The five
        special tokens have the numbers 0 (padding) to 4 (mask).

    Raises:
        ValueError: `texts` has no words.
    """
    with extra("finetune"):  # imported here, as reading and batching data does without them
        import tokenizers
        import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(
        special_tokens=list(SPECIAL_TOKENS), min_frequency=min_frequency, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == len(SPECIAL_TOKENS):
        raise ValueError("There are no words in the texts, so no vocabulary can be built.")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(os.fspath(folder))
    return tokenizer
