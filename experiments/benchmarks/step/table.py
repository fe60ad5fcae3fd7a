"""The record of a step profile as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = tuple[str, str, Callable[[Any], str]]
"""Title, key of the record, how to write the value."""

_JAX_COLUMNS: tuple[Column, ...] = (
    ("time/plain", "time_ratio", "{:.3f}".format),
    ("seconds", "seconds", "{:.4g}".format),
    ("examples/s", "examples_per_second", "{:.4g}".format),
    ("temp MB", "temp_bytes", lambda value: f"{value / 1e6:.1f}"),
    ("temp/plain", "temp_bytes_ratio", "{:.3f}".format),
    ("FLOPs/plain", "matrix_flops_ratio", "{:.3f}".format),
    ("peak MB", "peak_bytes", lambda value: f"{value / 1e6:.0f}"),
    ("TFLOP/s", "teraflops", "{:.4g}".format),
    ("of device", "fraction_of_matrix_rate", "{:.1%}".format),
    ("microbatch", "microbatch_size", str),
)
_OF_TORCH = ("time_ratio", "seconds", "examples_per_second", "peak_bytes")
_UPDATE_COLUMNS: tuple[Column, ...] = (
    ("time/noisy", "time_ratio", "{:.4f}".format),
    ("seconds", "seconds", "{:.4g}".format),
    ("FLOPs/noisy", "matrix_flops_ratio", "{:.4f}".format),
    ("moved MB", "bytes_accessed", lambda value: f"{value / 1e6:.1f}"),
    ("temp MB", "temporary_bytes", lambda value: f"{value / 1e6:.1f}"),
    ("state MB", "state_bytes", lambda value: f"{value / 1e6:.1f}"),
    ("microbatch", "microbatch_size", str),
)
_TORCH_COLUMNS = tuple(column for column in _JAX_COLUMNS if column[1] in _OF_TORCH)


def render(record: Mapping[str, Any]) -> str:
    """The tables of a record, JAX's and torch's, and below each the reasons why an arm has no numbers."""
    shapes, machine = record["shapes"], record["machine"]
    lines = [
        f"{record['model']}, {shapes['config']['num_layers']} layers, {shapes['trainable_parameters'] / 1e6:.1f} M "
        f"parameters trained; batch {shapes['batch_size']}, sequence {shapes['sequence_length']}, {record['dtype']}",
        f"{machine['device_kind']} ({machine['cpu']}, {machine['cores']} cores); medians of {record['repeats']} rounds",
    ]
    if "updates" in record:
        return "\n".join([*lines, "whole private updates", "", *_table(record["updates"], _UPDATE_COLUMNS)])
    rate = f"{record['matrix_teraflops']:.3g} TFLOP/s in a matrix product"
    lines += [rate, "", *_table(record["arms"], _JAX_COLUMNS)]
    if record["torch"]:
        torch = record["torch"]
        lines += ["", f"torch on {torch.get('device', 'nothing')}, in a process of its own; ratios to plain torch"]
        lines += [torch["reason"]] if torch["reason"] else ["", *_table(torch["arms"], _TORCH_COLUMNS)]
    return "\n".join(lines)


def _table(arms: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> list[str]:
    rows = [["arm", *(title for title, _, _ in columns)]]
    for arm, numbers in arms.items():
        if numbers.get("reason") is None:
            values = (numbers.get(key) for _, key, _ in columns)
            rows.append([arm, *("-" if value is None else show(value) for value, (_, _, show) in zip(values, columns))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return lines + [f"{arm}: {numbers['reason']}" for arm, numbers in arms.items() if numbers.get("reason")]
