"""Generates with every method, as a program for a process of its own: ``python generate_divided.py OUT.npz``.

The rows are divided over all devices there are; more than one device or not, the results must be the same.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from dp_rmt import models
from dp_rmt.generation import Beam, Greedy, Sampling, generate
from dp_rmt.generation.generate import _compiled
from dp_rmt.training.partitioning import data_mesh, place

METHODS = {
    "greedy": Greedy(max_new_tokens=10, eos_token_id=3),
    "beam": Beam(max_new_tokens=10, eos_token_id=3, num_beams=3, length_penalty=0.8),
    "sampling": Sampling(max_new_tokens=10, eos_token_id=3, seed=0),
}


def main(path: str) -> None:
    """Writes everything under ``METHOD/field``."""
    mesh = data_mesh()
    module = models.CausalLanguageModel(
        models.DecoderConfig(
            vocab_size=20,
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            intermediate_size=8,
            max_position_embeddings=32,
        )
    )
    params = place(jax.tree.map(lambda leaf: 8 * leaf, models.init_params(module, jax.random.key(0))), mesh)
    ids_BxL = np.random.default_rng(0).integers(0, 20, (4, 6)).astype(np.int32)
    mask_BxL = np.arange(6) >= np.array([0, 3, 5, 6])[:, None]  # the last row is padding
    results = {"num_devices": np.array(mesh.size)}
    for kind, method in METHODS.items():
        found = jax.block_until_ready(generate(module, params, ids_BxL, mask_BxL, method, mesh=mesh))
        assert len(found.tokens_BxT.sharding.device_set) == mesh.size
        results |= {f"{kind}/{name}": np.asarray(array) for name, array in found._asdict().items()}
    arguments = (params, jax.random.key(0), ids_BxL, mask_BxL, np.arange(4, dtype=np.int32))
    text = _compiled(module, METHODS["beam"], mesh).lower(*arguments).compile().as_text()
    results["collectives"] = np.array([text.count(name) for name in ("all-gather", "all-reduce", "all-to-all")])
    try:
        generate(module, params, ids_BxL[:3], mask_BxL[:3], METHODS["greedy"], mesh=mesh)
    except ValueError as error:
        results["refusal"] = np.array(str(error))
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
