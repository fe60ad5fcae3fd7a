"""Data: GLUE, table-to-text and synthetic text is tokenised once into arrays and gathered into batches of one shape."""

from dp_rmt.data.batches import evaluation_batches, gather_batch
from dp_rmt.data.fingerprint import fingerprint
from dp_rmt.data.model_fit import check_fits_model
from dp_rmt.data.prompt_format import PromptFormat, prompt_format_of
from dp_rmt.data.readers.document_tasks import DOCUMENT_TASKS, SENSITIVE, DocumentSet, load_documents
from dp_rmt.data.readers.documents import Document, tokenize_documents
from dp_rmt.data.readers.glue import Examples, GlueData, get_task, load_glue, read_tsv
from dp_rmt.data.readers.glue_tasks import GLUE_TASKS, GlueTask, Infilling
from dp_rmt.data.readers.labelled_table import Columns, LabelledTable, load_labelled_table
from dp_rmt.data.readers.own_pairs import OwnPairs, load_own_pairs
from dp_rmt.data.readers.synthetic import generate_reviews, write_corpus
from dp_rmt.data.readers.table_to_text import TABLE_TO_TEXT_TASKS, TableToText, load_table_to_text
from dp_rmt.data.readers.tables import Extras, Source, read_tables
from dp_rmt.data.readers.text_pairs import TextPairs, TextReferences
from dp_rmt.data.readers.text_shapes import Shape, read_prompt
from dp_rmt.data.tokens.completions import decode_completions, tokenize_completions, tokenize_prompts
from dp_rmt.data.tokens.infilling import label_word_ids
from dp_rmt.data.tokens.tokenize import tokenize_cached, tokenize_classification
from dp_rmt.data.tokens.word_tokenizer import build_word_tokenizer
from dp_rmt.scoring import text_scores
from dp_rmt.scoring.classification import glue_scores

__all__ = [
    "DOCUMENT_TASKS",
    "GLUE_TASKS",
    "SENSITIVE",
    "TABLE_TO_TEXT_TASKS",
    "Columns",
    "Document",
    "DocumentSet",
    "Examples",
    "Extras",
    "GlueData",
    "GlueTask",
    "Infilling",
    "LabelledTable",
    "OwnPairs",
    "PromptFormat",
    "Shape",
    "Source",
    "TableToText",
    "TextPairs",
    "TextReferences",
    "build_word_tokenizer",
    "check_fits_model",
    "decode_completions",
    "evaluation_batches",
    "fingerprint",
    "gather_batch",
    "generate_reviews",
    "get_task",
    "glue_scores",
    "label_word_ids",
    "load_documents",
    "load_glue",
    "load_labelled_table",
    "load_own_pairs",
    "load_table_to_text",
    "prompt_format_of",
    "read_prompt",
    "read_tables",
    "read_tsv",
    "text_scores",
    "tokenize_cached",
    "tokenize_classification",
    "tokenize_completions",
    "tokenize_documents",
    "tokenize_prompts",
    "write_corpus",
]
