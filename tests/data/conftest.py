"""Two small tokenizers: words with [CLS] and [SEP] (BERT's layout), byte-level BPE with <s> (RoBERTa's)."""

import pytest
import tokenizers
import transformers

from dp_rmt.data import build_word_tokenizer

CORPUS = (
    "the soup was great and the film was terrible .",
    "a b c d e f g h it was this is yes no maybe ? , correct incorrect",
)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    return build_word_tokenizer(CORPUS, tmp_path_factory.mktemp("word_tokenizer"))


@pytest.fixture(scope="session")
def byte_tokenizer():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["it was great great great", "it was terrible terrible terrible"] * 9
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )
