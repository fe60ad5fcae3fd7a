"""Published peaks of accelerators, with their sources, and the shapes of decoders, for `cost_model`."""

from __future__ import annotations

import dataclasses

PASSES_OF_A_FLOAT32_PRODUCT = 6
"""Products of bfloat16 parts that make one of float32 (`jax.lax.Precision.HIGHEST`), as the denoiser takes them."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one accelerator.

    Attributes:
      name: for tables.
      flops: bfloat16 products, dense, per second.
      float32_flops: products of float32 at full precision, per second.
      vector_ops: 32-bit operations outside of the matrix unit, per second.
      hbm_bytes: memory.
      hbm_bandwidth: bytes per second.
      node: devices of the fast domain.
      link: bytes per second that a device sends at most, to the others of its fast domain.
      link_out: the same between nodes; TPUs of one pod are one domain.
      sources: of the numbers.
    """

    name: str
    flops: float
    float32_flops: float
    vector_ops: float
    hbm_bytes: float
    hbm_bandwidth: float
    node: int
    link: float
    link_out: float
    sources: str


_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_TPU = "https://cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip(
        "TPU v5e",
        1.97e14,
        1.97e14 / PASSES_OF_A_FLOAT32_PRODUCT,
        8 * 128 * 4 * 1.5e9,
        16e9,
        8.1e11,
        256,
        2e11,
        2e11,
        f"{_TPU}/v5e and {_BOOK}: 197 TFLOP/s, 16 GB at 8.1e11 B/s, 4 links of 5e10 B/s each way (1,600 Gbit/s a "
        "chip); vector unit 8 x 128 lanes x 4 at 1.5 GHz",
    ),
    "v6e": Chip(
        "TPU v6e",
        9.2e14,
        9.2e14 / PASSES_OF_A_FLOAT32_PRODUCT,
        8 * 128 * 4 * 1.5e9,
        32e9,
        1.6e12,
        256,
        4e11,
        4e11,
        f"{_TPU}/v6e and {_BOOK}: 920 TFLOP/s, 32 GB at 1.6e12 B/s, 4 links of 1e11 B/s each way; the vector unit is "
        "not published, v5e's is assumed",
    ),
    "h100": Chip(
        "H100 SXM",
        9.89e14,
        6.7e13,
        3.35e13,
        80e9,
        3.35e12,
        8,
        4.5e11,
        5e10,
        "https://www.nvidia.com/en-us/data-center/h100/: 989 TFLOP/s bfloat16 dense, 67 TFLOP/s float32 (33.5e12 "
        "operations), 80 GB at 3.35e12 B/s, NVLink 900 GB/s in both directions together; between nodes 400 Gbit/s for "
        "each GPU (DGX H100)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Shapes of a decoder of Llama's kind, without tied embeddings.

    Attributes:
      hidden: width of the hidden states.
      layers: number of layers.
      query: width of all query heads together.
      key: width of all key heads together, and of all value heads.
      inner: width inside the feed-forward part.
      vocab: words.
    """

    hidden: int
    layers: int
    query: int
    key: int
    inner: int
    vocab: int

    @property
    def kernels(self) -> dict[str, tuple[int, int, int]]:
        """name -> (how many, inputs, outputs)."""
        d, q, k, f, n = self.hidden, self.query, self.key, self.inner, self.layers
        return {
            "query": (n, d, q),
            "key": (n, d, k),
            "value": (n, d, k),
            "output": (n, q, d),
            "gate": (n, d, f),
            "up": (n, d, f),
            "down": (n, f, d),
            "lm_head": (1, d, self.vocab),
        }

    @property
    def layer_parameters(self) -> int:
        """Of all matrices but the head and the embedding."""
        return sum(n * i * o for name, (n, i, o) in self.kernels.items() if name != "lm_head")

    @property
    def parameters(self) -> int:
        """All but the scales of norms, which are 1e-5 of them.

        >>> round(MODELS["Llama-3 8B"].parameters / 1e9, 2), round(MODELS["Llama-3 70B"].parameters / 1e9, 2)
        (8.03, 70.55)
        """
        return self.layer_parameters + 2 * self.hidden * self.vocab


MODELS = {
    "Llama-3 8B": Decoder(4096, 32, 4096, 1024, 14336, 128256),
    "Llama-3 70B": Decoder(8192, 80, 8192, 1024, 28672, 128256),
}
"""https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json and -70B (arXiv 2407.21783, table 3)."""
