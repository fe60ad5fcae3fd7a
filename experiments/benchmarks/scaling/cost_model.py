"""What a private step costs, from first principles: operations, bytes, collectives, and the least time on a chip.

Counts follow the implementation term by term (book-keeping clipping with ghost norms, Threefry noise, the subspace
denoiser, Adam in float32); `experiments.benchmarks.scaling.main` holds them against compiled programs. Times are
bounds, not forecasts: every unit at its published peak, communication hidden behind computation wherever the program
allows it.
"""

from __future__ import annotations

import dataclasses
import math

from experiments.benchmarks.scaling.hardware import Chip, Decoder

FLOAT32, BFLOAT16 = 4, 2

NOISE_OPERATIONS = 250
"""Vector operations for one normal number: 20 rounds of Threefry with their keys (115; JAX's partitionable form takes
a block for each number), the bits to a uniform number, the inverse error function with its branches. XLA's program for
the CPU has 247 (tests/experiments/benchmarks/test_scaling.py)."""


# ---- Operations -----------------------------------------------------------------------------------------------------


def plain_flops(model: Decoder, tokens: int, length: int) -> float:
    """Products of a gradient: ``6 P n`` of the matrices, ``12 L T q n`` of attention (Kaplan et al. 2020)."""
    matrices = model.layer_parameters + model.hidden * model.vocab
    return 6.0 * matrices * tokens + 12.0 * model.layers * length * model.query * tokens


def remat_flops(model: Decoder, tokens: int, length: int, *, private: bool) -> float:
    """Products that `nn.remat` adds: a second forward pass, but for the last matrix of each layer, whose result nothing
    needs. Clipping by book-keeping takes a third one, and goes back through the layers again.
    """
    forward = 2.0 * (model.layer_parameters - model.layers * model.hidden * model.inner) * tokens
    attention = 4.0 * model.layers * length * model.query * tokens
    back = 2.0 * model.layer_parameters * tokens + 2 * attention
    return forward + attention + private * (forward + attention + back)


def norm_flops(model: Decoder, tokens: int, length: int) -> float:
    """Products of the ghost norms: ``2 T n`` for each distinct input and each output of a layer, and the word vectors.

    ``|g_i|^2 = sum_ts (x_t . x_s)(g_t . g_s)`` (Li et al. 2022): query, key and value share their input, gate and up
    too. Where ``T (I + O) > I O`` or ``I <= 2 T`` the rules of `dp_rmt.clipping.leaf_rules` instantiate gradients
    instead; this count is for lengths below that, as all of the models here at T = 512 but for key and value (within
    7%).
    """
    d, q, k, f = model.hidden, model.query, model.key, model.inner
    inputs, outputs = 2 * d + q + f, q + 2 * k + d + 2 * f + d
    return 2.0 * length * tokens * (model.layers * (inputs + outputs) + d + model.vocab + d)


def noise_vector_ops(model: Decoder) -> float:
    """Vector operations of the noise of all parameters."""
    return float(NOISE_OPERATIONS * model.parameters)


def denoise_flops(model: Decoder, devices: int) -> float:
    """Products of float32 on the device that has most to do: matrices of a shape are divided among the devices.

    Of a matrix with sides m <= n: ``2 m^2 n`` of ``Y Y^T``, ``m^3 / 3`` of the certificate's Cholesky factor, and
    ``4 m n r`` to restore r = 32 directions. The Krylov space in between is of order ``m^2 100``.
    """
    total = 0.0
    for sides, count in _matrices_by_shape(model).items():
        m, n = sorted(sides)
        total += math.ceil(count / devices) * (2.0 * m * m * n + m**3 / 3 + 4.0 * m * n * 32 + 2.0 * m * m * 100)
    return total


def _matrices_by_shape(model: Decoder) -> dict[tuple[int, int], int]:
    """(inputs, outputs) -> how many; those of a shape are denoised as one batch."""
    groups: dict[tuple[int, int], int] = {}
    for count, inputs, outputs in model.kernels.values():
        groups[inputs, outputs] = groups.get((inputs, outputs), 0) + count
    return groups


# ---- Bytes ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is divided.

    Attributes:
      data: devices that hold copies.
      fsdp: devices that divide the parameters.
      examples: of the batch, all devices together.
      length: tokens of each.
      at_once: examples that one device differentiates at once.
      gathered: bytes of a gathered parameter.
      remat: layers are computed again in the backward pass, instead of being kept.
    """

    data: int
    fsdp: int
    examples: int
    length: int
    at_once: int
    gathered: int = BFLOAT16
    remat: bool = False

    @property
    def devices(self) -> int:
        """All."""
        return self.data * self.fsdp

    @property
    def passes(self) -> int:
        """Microbatches, each of which gathers all parameters again."""
        return math.ceil(self.examples / self.devices / self.at_once)


def gather_bytes(model: Decoder, layout: Layout) -> float:
    """Parameters that arrive at a device in one pass: the layers forward and backward, the head once.

    Clipping a model with `nn.remat` goes back twice.
    """
    return layout.gathered * ((2.0 + layout.remat) * model.layer_parameters + model.hidden * model.vocab)


def gradient_bytes(model: Decoder) -> float:
    """Of the gradient of the matrices, which is summed over the devices in float32."""
    return float(FLOAT32 * (model.layer_parameters + model.hidden * model.vocab))


def exchange_bytes(model: Decoder, devices: int) -> float:
    """What a device gets of others for denoising, and again after it, in float32.

    First its whole matrices, of each shape ``ceil(count / devices)``, for its parts of all; then its parts back.
    """
    return (
        2.0
        * FLOAT32
        * sum(
            math.ceil(count / devices) * inputs * outputs
            for (inputs, outputs), count in _matrices_by_shape(model).items()
        )
    )


def embedding_bytes(model: Decoder, layout: Layout, activations: int = BFLOAT16) -> float:
    """Word vectors that change places, since the table is divided by columns: forward and backward."""
    return 2.0 * activations * layout.at_once * layout.length * model.hidden


def state_bytes(model: Decoder, layout: Layout) -> float:
    """Parameters, two moments and the gradient of a device, float32."""
    return 4.0 * FLOAT32 * model.parameters / layout.fsdp


def activation_bytes(model: Decoder, layout: Layout) -> float:
    """Of book-keeping: inputs of all layers, weights of attention, gradients of all outputs, and the scores of words.

    With `nn.remat` the hidden states between the layers, and all that of one layer.
    """
    d, q, k, f = model.hidden, model.query, model.key, model.inner
    inputs = 4 * d + q + 2 * k + 3 * f  # also what the norms and the gate need
    outputs = 2 * d + q + 2 * k + 2 * f
    attention = 2 * (q // 128) * layout.length  # heads of 128
    layers = 1 if layout.remat else model.layers
    between = model.layers * d if layout.remat else 0
    per_token = BFLOAT16 * (layers * (inputs + outputs + attention) + between) + 2 * FLOAT32 * model.vocab
    return float(per_token * layout.at_once * layout.length)


def memory_traffic(model: Decoder, layout: Layout) -> dict[str, float]:
    """Bytes that a device's memory moves in a step, by cause.

    Each pass writes the gathered weights and reads them, forward and backward, and writes and reads the gradient that
    it sends; it writes and reads its activations. Then the update: gradient, moments, parameters.
    """
    matrices = model.layer_parameters + model.hidden * model.vocab
    once = 2.0 * gather_bytes(model, layout) + 2.0 * FLOAT32 * matrices + 2.0 * activation_bytes(model, layout)
    update = FLOAT32 * 10.0 * model.parameters / layout.fsdp  # noise: 2; Adam: reads 4, writes 3; accumulates: 1
    return {"passes": layout.passes * once, "update": update}


# ---- Time -----------------------------------------------------------------------------------------------------------


def ring_bandwidth(chip: Chip, devices: int) -> float:
    """Bytes per second that arrive at every device when an array is gathered from all.

    In one domain what a device can send; over nodes what a node can receive, which is then passed on inside it.
    """
    return chip.link if devices <= chip.node else min(chip.link, chip.node * chip.link_out)


def step_seconds(model: Decoder, chip: Chip, layout: Layout) -> dict[str, float]:
    """The least time of each part of a private step, and of the whole.

    Forward and backward take the longest of products, memory and network, which overlap; noise, denoiser and update
    follow one after the other. The denoiser exchanges parts of all matrices for whole ones, and back.

    Args:
      model: its shapes.
      chip: its peaks.
      layout: of the step.

    Returns:
      Seconds by part; "total", and "plain" for a step without privacy in the same layout.
    """
    tokens = layout.examples * layout.length // layout.devices  # of one device
    bandwidth = ring_bandwidth(chip, layout.devices)
    share = (layout.devices - 1) / layout.devices
    traffic = memory_traffic(model, layout)

    def network_seconds(layout: Layout) -> float:
        arrives = gather_bytes(model, layout) + gradient_bytes(model) + embedding_bytes(model, layout)
        return layout.passes * share * arrives / bandwidth

    def products(private: bool) -> float:
        again = layout.remat * remat_flops(model, tokens, layout.length, private=private)
        return (plain_flops(model, tokens, layout.length) + again) / chip.flops

    norms = norm_flops(model, tokens, layout.length) / chip.flops
    memory, network = traffic["passes"] / chip.hbm_bandwidth, network_seconds(layout)
    update = traffic["update"] / chip.hbm_bandwidth
    noise = noise_vector_ops(model) / layout.fsdp / chip.vector_ops
    decompose = denoise_flops(model, layout.devices) / chip.float32_flops
    exchange = share * exchange_bytes(model, layout.devices) / bandwidth
    passes = max(products(private=True) + norms, memory, network)
    plain = max(products(private=False), memory, network_seconds(dataclasses.replace(layout, remat=False)))
    return {
        "products": products(private=True),
        "norms": norms,
        "memory": memory,
        "network": network,
        "update": update,
        "noise": noise,
        "denoise": decompose,
        "denoise network": exchange,
        "total": passes + update + noise + decompose + exchange,
        "plain": plain + update,
    }


def fastest_layout(model: Decoder, chip: Chip, devices: int, examples: int, length: int) -> Layout | None:
    """The layout of the fastest step that fits in nine tenths of memory; all devices divide the parameters.

    None where nothing fits. A layer's gathered parameters, twice, and its gradient are counted as whole. The denoiser,
    after them, has four copies of the matrices of one shape that are its own: as parts and whole, before and after.
    """
    per_device = max(1, examples // devices)
    denoised = 4 * FLOAT32 * max(math.ceil(n / devices) * i * o for (i, o), n in _matrices_by_shape(model).items())

    def fits(layout: Layout) -> bool:
        one_layer = model.layer_parameters / model.layers * (2 * layout.gathered + FLOAT32)
        head = model.hidden * model.vocab * (layout.gathered + FLOAT32)
        passes = activation_bytes(model, layout) + one_layer + head
        return state_bytes(model, layout) + max(passes, denoised) <= 0.9 * chip.hbm_bytes

    layouts = [
        Layout(1, devices, examples, length, at_once, remat=remat)
        for at_once in range(1, per_device + 1)
        for remat in (False, True)
        if per_device % at_once == 0
    ]
    return min(filter(fits, layouts), key=lambda layout: step_seconds(model, chip, layout)["total"], default=None)
