"""What greedy decoding of a model costs here and in torch transformers, in turns, on the same batch.

    python -m experiments.benchmarks.generation --model=FOLDER --batch_size=32 --new_tokens=64

FOLDER is a decoder in Hugging Face layout, or its name on the hub. The prompts are random tokens of different lengths,
padded on the left; no row ends before --new_tokens, so that both sides do the same work. Compiling is not timed, but
reported. The tokens of both sides are compared: they agree but where two logits are equal to rounding. Prints a table,
writes a JSON file under --results. Without torch there is only this package's side.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from dp_rmt.files import write_atomically
from dp_rmt.finetuning import command_line
from dp_rmt.generation import Greedy, generate
from dp_rmt.models import load_pretrained
from dp_rmt.reporting import machine
from experiments.benchmarks import rounds

OURS, THEIRS = "dp_rmt", "transformers"


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the record."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    try:
        names = ("batch_size", "prompt_length", "new_tokens", "dtype", "repeats", "note")
        settings: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
        record = profile(flags.FLAGS.model, **settings)
    except (ValueError, OSError) as error:
        command_line.stop(error)
    device = re.sub(r"\W+", "-", record["machine"]["device_kind"]).lower()
    name = f"{record['model']}-{device}-{record['dtype']}-b{record['batch_size']}-n{record['new_tokens']}.json"
    path = Path(flags.FLAGS.results) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(render(record))
    print(f"Record: {path}")


def profile(
    model: str, *, batch_size: int, prompt_length: int, new_tokens: int, dtype: str, repeats: int, note: str = ""
) -> dict[str, Any]:
    """Seconds and tokens per second of each side, and how far their tokens agree; the arguments are the flags."""
    module, params = load_pretrained(model, head="causal_lm", dtype=dtype)
    ids_BxL, mask_BxL = prompts(module.config.vocab_size, batch_size, prompt_length)
    method = Greedy(max_new_tokens=new_tokens)
    runs: dict[str, Callable[[], np.ndarray]] = {
        OURS: lambda: np.asarray(generate(module, params, ids_BxL, mask_BxL, method).tokens_BxT)
    }
    if has_torch():
        runs[THEIRS] = torch_run(model, ids_BxL, mask_BxL, new_tokens, dtype)
    tokens: dict[str, np.ndarray] = {}
    first = {name: rounds.timed(functools.partial(_keep, tokens, name, run)) for name, run in runs.items()}
    seconds = rounds.alternate(runs, repeats)
    arms: dict[str, Any] = {}
    for name, measured in seconds.items():
        median = statistics.median(measured)
        arms[name] = {
            "seconds_of_rounds": measured,
            "seconds": median,
            "tokens_per_second": ids_BxL.shape[0] * method.max_new_tokens / median,
            "first_run_seconds": first[name],
            "time_ratio": rounds.median_ratio(measured, seconds[OURS]),
        }
    return {
        "model": model_name(model),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "dtype": dtype,
        "batch_size": batch_size,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "note": note,
        "rows_with_the_same_tokens": _same_rows(tokens),
        "machine": machine.description(),
        "versions": machine.versions(("jax", "jaxlib", "torch", "transformers")),
        "arms": arms,
    }


def model_name(folder_or_hub_name: str) -> str:
    """For the record's name: the last part of a folder, all of a hub name.

    >>> model_name("meta-llama/Llama-3.2-1B")
    'meta-llama-Llama-3.2-1B'
    """
    folder = Path(folder_or_hub_name)
    return folder.absolute().name if folder.exists() else folder_or_hub_name.replace("/", "-")


def prompts(vocab_size: int, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of random tokens, of `length` down to a half of it, padded on the left."""
    rng = np.random.default_rng(0)
    counts_B = np.linspace(length, (length + 1) // 2, batch_size).astype(int)
    mask_BxL = (np.arange(length) >= length - counts_B[:, None]).astype(np.int32)
    return rng.integers(0, vocab_size, mask_BxL.shape).astype(np.int32) * mask_BxL, mask_BxL


def has_torch() -> bool:
    """Whether torch is installed; it is not needed for anything else here."""
    return importlib.util.find_spec("torch") is not None


def torch_run(
    folder: str, ids_BxL: np.ndarray, mask_BxL: np.ndarray, new_tokens: int, dtype: str
) -> Callable[[], np.ndarray]:
    """Greedy decoding by `transformers`, on JAX's kind of device and on as many cores.

    Args:
      folder: or hub name.
      ids_BxL: token ids, padded on the left.
      mask_BxL: 1 for a token, 0 for padding.
      new_tokens: of each row; no token ends a row.
      dtype: "float32" or "bfloat16".

    Returns:
      A function that decodes and gives the new tokens, (B, new_tokens).
    """
    import torch
    import transformers

    torch.set_num_threads(machine.cores())
    device = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    ids, mask = (torch.tensor(array, dtype=torch.long, device=device) for array in (ids_BxL, mask_BxL))

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask)[:, ids.shape[1] :].cpu().numpy()

    return run


def _keep(tokens: dict[str, np.ndarray], name: str, run: Callable[[], np.ndarray]) -> None:
    tokens[name] = run()


def _same_rows(tokens: dict[str, np.ndarray]) -> int | None:
    """Rows that both sides continue alike; None without the other side."""
    if THEIRS not in tokens:
        return None
    return int((tokens[OURS] == tokens[THEIRS]).all(axis=1).sum())


def render(record: dict[str, Any]) -> str:
    """The record as a table."""
    host = record["machine"]
    lines = [
        f"{record['model']} ({record['parameters'] / 1e6:.3g}M parameters, {record['dtype']}): {record['batch_size']} "
        f"prompts of {record['prompt_length']} tokens or less, {record['new_tokens']} new ones",
        f"{host['device_kind']} ({host['cpu']}, {host['cores']} cores) {record['note']}".rstrip(),
        "",
    ]
    rows = [["", "seconds", "tokens/s", f"time/{OURS}", "first run"]]
    for name, arm in record["arms"].items():
        keys = ("seconds", "tokens_per_second", "time_ratio", "first_run_seconds")
        rows.append([name, *(f"{arm[key]:.3g}" for key in keys)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    same = record["rows_with_the_same_tokens"]
    compared = "" if same is None else f"{same} of {record['batch_size']} rows have the same tokens"
    return "\n".join([*lines, compared or "torch is not installed"])


if __name__ == "__main__":  # flags are defined here, so that other programs and tests can import the rest
    flags.DEFINE_string("model", None, "Folder or hub name of a decoder.", required=True)
    flags.DEFINE_integer("batch_size", 32, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("prompt_length", 32, "Tokens of the longest prompt.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "Tokens that each prompt is continued by.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype of both sides.")
    flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
    flags.DEFINE_string("note", "", "What else is to be known of the machine at the time, for the record.")
    flags.DEFINE_string("results", "experiments/benchmarks/results/generation", "Folder of the records.")
    command_line.run(main)
