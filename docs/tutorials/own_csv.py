# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own CSV, private, in ten minutes
#
# From a file of labelled texts to a model that may leave the house, with a statement of what it reveals. You need
# `pip install -e ".[finetune]"`, a CSV file with the columns `text` and `label`, and a pre-trained model.
#
# So that this page runs anywhere, it makes up a file of reviews and a very small model. Skip that cell and give your
# own.

# %%
from dp_rmt import environment

environment.prepare()  # settings of XLA, before JAX is imported

# %%
from pathlib import Path

import jax

import dp_rmt
from dp_rmt.data import build_word_tokenizer, generate_reviews
from dp_rmt.models import EncoderConfig, MaskedLanguageModel, init_params, save_pretrained

reviews = generate_reviews(800, 0, domain="private")
rows = "".join(f'"{text}",{"good" if label else "bad"}\n' for text, label in reviews)
Path("reviews.csv").write_text("text,label\n" + rows, encoding="utf-8")

tokenizer = build_word_tokenizer([text for text, _ in generate_reviews(800, 1, domain="public")], Path("tokenizer"))
encoder = MaskedLanguageModel(
    EncoderConfig(
        architecture="bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
    )
)
save_pretrained(Path("encoder"), encoder, init_params(encoder, jax.random.key(0)), tokenizer=tokenizer)

# %% [markdown]
# ## Train
#
# `epsilon` is the privacy budget; [what it means, in figures](../start/privacy_in_figures.md). `labels` names the
# classes, so that they are not read from private rows. With a real model write `model="roberta-base"`, leave the other
# settings out, and take 200 steps or more. The program then chooses delta, the batch and the schedule by the number of
# rows.

# %%
run = dp_rmt.finetune(
    model="encoder",
    train="reviews.csv",
    epsilon=3.0,
    workdir="runs/reviews",
    labels=("bad", "good"),
    num_steps=20,
    expected_batch_size=128,
    microbatch_size=32,
    max_length=32,
    length_groups=(),
)

# %% [markdown]
# ## What it reveals
#
# The statement is a file for people, `privacy.md`, and one for programs. Read the first before you release anything.

# %%
print("epsilon", run.privacy["epsilon"], "delta", run.privacy["delta"])
print(Path("runs/reviews/privacy.md").read_text(encoding="utf-8")[:1500])

# %% [markdown]
# ## Use it
#
# Twenty steps of a model that was never pre-trained teach it little; the calls are those of a real one.

# %%
print(run.predict(["the soup was bland , but the staff was lovely", "nobody could call the plot dull"]))

# %% [markdown]
# ## Release it
#
# `save` copies what may be released, in the layout of Hugging Face, with the statement beside it. Everything else in
# the workdir stays at home: the checkpoints hold the key of the noise, and `metrics.jsonl` holds values without noise.

# %%
run.save("reviews_model")
print(sorted(path.name for path in Path("reviews_model").iterdir()))

# %% [markdown]
# ## Next
#
# - [Choosing epsilon, delta, batch and steps](choosing.py)
# - [What the statement covers](../start/statement.md), for the colleague who has to sign
# - [It does not work](../start/troubleshooting.md)
