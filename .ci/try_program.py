"""What a stranger does first with an installed dp_rmt[finetune]: run outside any checkout.

    python try_program.py

Ends with an error unless the console script lists its commands and its settings, answers a misspelt setting quickly
and in one line, every module of the package can be imported, and each of the three doors fine-tunes: `dp-rmt finetune`
on a CSV file, `dp_rmt.finetune` on the same, and `dp_rmt.training.prepare_run` on data and a model of one's own. The
model of the first has its card, is asked again, and is not uploaded beside what is private.
"""

import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import dp_rmt

dp_rmt.environment.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from dp_rmt.data import build_word_tokenizer, generate_reviews  # noqa: E402
from dp_rmt.models import EncoderConfig, MaskedLanguageModel, init_params, save_pretrained  # noqa: E402
from dp_rmt.training import Task, Transforms, prepare_run  # noqa: E402

SCRIPT = Path(sys.executable).with_name("dp-rmt")


def dp_rmt_says(*arguments: str) -> tuple[int, str, float]:
    """Exit status, both outputs, seconds."""
    start = time.perf_counter()
    ended = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=600)
    return ended.returncode, ended.stdout + ended.stderr, time.perf_counter() - start


assert "site-packages" in dp_rmt.__file__, f"{dp_rmt.__file__} is not the installed package"
status, said, _ = dp_rmt_says("--help")
assert status == 0, said
assert "dp-rmt finetune" in said, said
status, said, _ = dp_rmt_says("finetune", "--help")
assert "l2_clip_norm" in said, said
seconds = []
for _ in range(2):  # the first reads the files of the libraries for the first time
    status, said, took = dp_rmt_says(
        "finetune", "--model=m", "--train=sst2", "--epsilon=3", "--config.privacy.epsilonn=3"
    )
    seconds.append(took)
    assert status != 0, said
    assert "epsilonn" in said, said
    assert "Traceback" not in said, said
print(f"a misspelt setting is answered in {min(seconds):.2f} s: {said.strip()}")
for module in pkgutil.walk_packages(dp_rmt.__path__, "dp_rmt."):
    importlib.import_module(module.name)
print("every module can be imported")

# A CSV file of labelled text, and a random encoder as a Hugging Face folder.
reviews = [(text, label) for text, label in generate_reviews(400, 0, domain="public")]
lines = [f'"{text}",{"good" if label else "bad"}\n' for text, label in reviews]
Path("reviews.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
tokenizer = build_word_tokenizer([text for text, _ in reviews], Path("tokenizer"))
encoder = MaskedLanguageModel(
    EncoderConfig(
        architecture="bert",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=tokenizer.pad_token_id,
    )
)
save_pretrained(Path("encoder"), encoder, init_params(encoder, jax.random.key(0)), tokenizer=tokenizer)
SHORT = {
    "train.epochs": 1.0,
    "train.microbatch_size": 64,  # "auto" compiles a step for each size that it tries
    "privacy.expected_batch_size": 64,
    "privacy.accountant": "rdp",
    "data.max_length": 32,
    "data.length_groups": (),
}

status, said, took = dp_rmt_says(
    *("finetune", "--model=encoder", "--train=reviews.csv", "--epsilon=0.5", "--workdir=by_script"),
    *(f"--config.{key}={value}" for key, value in SHORT.items()),
)
assert status == 0, said
assert Path("by_script/privacy.md").exists(), said
print(f"dp-rmt finetune on a CSV file: {took:.0f} s")
assert "dp-rmt finetune --model=MODEL --train=DATA" in Path("by_script/model/README.md").read_text(encoding="utf-8")
Path("texts.txt").write_text("a good film\na bad film\n", encoding="utf-8")
status, said, took = dp_rmt_says("predict", "--workdir=by_script", "--texts=texts.txt", "--config.data.max_length=16")
assert status == 0, said
assert said.count('"prediction": ') == 2, said
print(f"dp-rmt predict: {took:.0f} s")
status, said, _ = dp_rmt_says("push", "--folder=by_script", "--repo=nobody/nothing")
assert status != 0, said
assert "nothing was uploaded. Give by_script/model" in said, said
status, said, _ = dp_rmt_says("spent", "--workdirs=by_script")
assert "noise multiplier" in said, said
found = dp_rmt.finetune(model="encoder", train="reviews.csv", epsilon=0.5, workdir="by_function", **SHORT)
assert 0 < found.privacy["epsilon"] <= 0.5
assert set(found.predict(["a good film", "a bad film"])) <= {"good", "bad"}
print(f"dp_rmt.finetune: epsilon {found.privacy['epsilon']:.3f}, {dict(found.scores)}")

x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
run = prepare_run(
    Task(
        {"x": x, "y": x @ np.ones((8, 4), np.float32)},
        lambda params, batch: jnp.sum((batch["x"] @ params["kernel"] - batch["y"]) ** 2, axis=-1),
        {"kernel": jnp.zeros((8, 4))},
    ),
    dp_rmt.DPSGD.calibrated(
        epsilon=0.5,
        delta=1e-4,
        num_examples=500,
        expected_batch_size=64,
        num_steps=3,
        l2_clip_norm=1.0,
        accountant="rdp",
    ),
    lambda mechanism, noise_seed, mesh: Transforms(
        mechanism.noise(dp_rmt.noise_addition.noise_key(noise_seed)), mechanism.denoiser(), optax.adam(0.1)
    ),
    delta=1e-4,
)
assert int(run.train(Path("by_run")).step) == 3
assert Path("by_run/privacy.md").exists()
print("dp_rmt.training.prepare_run: trains a model of one's own")
