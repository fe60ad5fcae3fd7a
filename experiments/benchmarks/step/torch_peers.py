"""Runs the torch peers of the step profiler in a process of their own, on the same shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_rmt.models import EncoderConfig
from experiments.benchmarks.step.models import MODELS, NUM_LABELS
from third_party.peers import TORCH, NotInstalledError, require

ROOT = Path(__file__).parents[3]


def measure_torch(
    model: str,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: str,
    num_layers: int | None,
    repeats: int,
    l2_clip_norm: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """What `third_party.peers.torch_profile` measures.

    Args:
      model: a key of `MODELS`.
      batch_size: examples.
      sequence_length: tokens of each.
      dtype: "float32" or "bfloat16".
      num_layers: instead of the model's own number.
      repeats: rounds.
      l2_clip_norm: Opacus's max_grad_norm.
      progress: called with one line at a time.

    Returns:
      ``{"reason": None, "device": ..., "arms": {"plain": ..., "opacus_ghost": ...}}``, or the reason why there is
      nothing; without Opacus its arm is the reason.

    Raises:
      RuntimeError: the process failed.
    """
    config = MODELS[model]
    if not isinstance(config, EncoderConfig):
        return {"reason": f"no torch peer for {model}: the encoders have one"}
    try:
        require(TORCH)
    except NotInstalledError as error:
        return {"reason": str(error)}
    hf_config = config.to_hf_config() | ({"num_hidden_layers": num_layers} if num_layers else {})
    settings = {
        "hf_config": hf_config,
        "num_labels": NUM_LABELS,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "dtype": dtype,
        "repeats": repeats,
        "l2_clip_norm": l2_clip_norm,
    }
    progress("torch peers, in a process of their own")
    finished = subprocess.run(
        [sys.executable, "-m", TORCH.driver, json.dumps(settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the process of the torch peers failed:\n{finished.stderr[-2000:]}")
    return {"reason": None} | json.loads(finished.stdout.splitlines()[-1])
