"""Says where the Hugging Face files of each kind of encoder keep what."""

from __future__ import annotations

from dp_rmt.models.huggingface.tensor_layouts import PLAIN, TRANSPOSED, Layout

# The parts of each kind of layer: Flax leaf, Hugging Face suffix, layout.
LEAVES: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "dense": (("kernel", "weight", TRANSPOSED), ("bias", "bias", PLAIN)),
    "layer_norm": (("scale", "weight", PLAIN), ("bias", "bias", PLAIN)),
    "embedding": (("embedding", "weight", PLAIN),),
    "matrix": (("kernel", "weight", TRANSPOSED),),
    "bias": (("bias", "bias", PLAIN),),
}

Modules = tuple[tuple[str, str, str], ...]
"""For each module the Flax path, the Hugging Face module, and its kind, a key of `LEAVES`."""

_EMBEDDINGS: Modules = (
    ("encoder/embeddings/word_embeddings", "embeddings.word_embeddings", "embedding"),
    ("encoder/embeddings/position_embeddings", "embeddings.position_embeddings", "embedding"),
    ("encoder/embeddings/token_type_embeddings", "embeddings.token_type_embeddings", "embedding"),
    ("encoder/embeddings/layer_norm", "embeddings.LayerNorm", "layer_norm"),
)
_BERT: Modules = (
    *_EMBEDDINGS,
    ("encoder/layers/attention/query", "encoder.layer.{layer}.attention.self.query", "dense"),
    ("encoder/layers/attention/key", "encoder.layer.{layer}.attention.self.key", "dense"),
    ("encoder/layers/attention/value", "encoder.layer.{layer}.attention.self.value", "dense"),
    ("encoder/layers/attention/output", "encoder.layer.{layer}.attention.output.dense", "dense"),
    ("encoder/layers/attention_layer_norm", "encoder.layer.{layer}.attention.output.LayerNorm", "layer_norm"),
    ("encoder/layers/intermediate", "encoder.layer.{layer}.intermediate.dense", "dense"),
    ("encoder/layers/output", "encoder.layer.{layer}.output.dense", "dense"),
    ("encoder/layers/output_layer_norm", "encoder.layer.{layer}.output.LayerNorm", "layer_norm"),
)
_DISTILBERT: Modules = (
    *_EMBEDDINGS,
    ("encoder/layers/attention/query", "transformer.layer.{layer}.attention.q_lin", "dense"),
    ("encoder/layers/attention/key", "transformer.layer.{layer}.attention.k_lin", "dense"),
    ("encoder/layers/attention/value", "transformer.layer.{layer}.attention.v_lin", "dense"),
    ("encoder/layers/attention/output", "transformer.layer.{layer}.attention.out_lin", "dense"),
    ("encoder/layers/attention_layer_norm", "transformer.layer.{layer}.sa_layer_norm", "layer_norm"),
    ("encoder/layers/intermediate", "transformer.layer.{layer}.ffn.lin1", "dense"),
    ("encoder/layers/output", "transformer.layer.{layer}.ffn.lin2", "dense"),
    ("encoder/layers/output_layer_norm", "transformer.layer.{layer}.output_layer_norm", "layer_norm"),
)
# The groups of a head. A group is loaded as a whole or, if it is absent, initialised as a whole.
_ONE_HEAD = "classification head"
_WORDS = "masked language model head"
_BERT_HEADS: dict[str, dict[str, Modules]] = {
    "classification": {
        "pooler": (("pooler", "pooler.dense", "dense"),),
        "classifier": (("classifier", "classifier", "dense"),),
    },
    "masked_lm": {
        _WORDS: (
            ("mlm_head/dense", "cls.predictions.transform.dense", "dense"),
            ("mlm_head/layer_norm", "cls.predictions.transform.LayerNorm", "layer_norm"),
            ("mlm_head/decoder", "cls.predictions.decoder", "matrix"),
            ("mlm_head", "cls.predictions", "bias"),
        ),
    },
}
_ROBERTA_HEADS: dict[str, dict[str, Modules]] = {
    "classification": {
        _ONE_HEAD: (("pooler", "classifier.dense", "dense"), ("classifier", "classifier.out_proj", "dense")),
    },
    "masked_lm": {
        _WORDS: (
            ("mlm_head/dense", "lm_head.dense", "dense"),
            ("mlm_head/layer_norm", "lm_head.layer_norm", "layer_norm"),
            ("mlm_head/decoder", "lm_head.decoder", "matrix"),
            ("mlm_head", "lm_head", "bias"),
        ),
    },
}
_DISTILBERT_HEADS: dict[str, dict[str, Modules]] = {
    "classification": {
        _ONE_HEAD: (("pooler", "pre_classifier", "dense"), ("classifier", "classifier", "dense")),
    },
    "masked_lm": {
        _WORDS: (
            ("mlm_head/dense", "vocab_transform", "dense"),
            ("mlm_head/layer_norm", "vocab_layer_norm", "layer_norm"),
            ("mlm_head/decoder", "vocab_projector", "matrix"),
            ("mlm_head", "vocab_projector", "bias"),
        ),
    },
}
HEAD_PARTS = (
    *("pooler.", "classifier.", "cls.", "lm_head.", "qa_outputs."),
    *("pre_classifier.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
BACKBONE_PARTS = ("embeddings.", "encoder.", "pooler.", "transformer.")
"""The beginnings of the names that have the family's prefix in a file of a model with a head."""


def groups_of(architecture: str, head: str) -> dict[str, Modules]:
    """The modules of an encoder with a head, by group: "encoder", and the groups of the head.

    Args:
        architecture: a key of `dp_rmt.models.encoder_families.ENCODER_FAMILIES`.
        head: "classification" or "masked_lm".
    """
    if architecture == "distilbert":
        return {"encoder": _DISTILBERT, **_DISTILBERT_HEADS[head]}
    return {"encoder": _BERT, **(_BERT_HEADS if architecture == "bert" else _ROBERTA_HEADS)[head]}


def tied_copies(architecture: str, *, is_tied: bool) -> dict[str, str]:
    """The tensors that a file may hold twice, though the module has them once: copy -> original.

    Args:
        architecture: as in `groups_of`.
        is_tied: whether the word embedding is the matrix of the word scores, too.
    """
    modules = {path: name for path, name, _ in groups_of(architecture, "masked_lm")[_WORDS]}
    decoder, head = modules["mlm_head/decoder"], modules["mlm_head"]
    copies = {} if decoder == head else {f"{decoder}.bias": f"{head}.bias"}
    return copies | ({f"{decoder}.weight": "embeddings.word_embeddings.weight"} if is_tied else {})
