"""From settings to what follows the clipped gradient: noise, denoising, optimizer, each of them named.

A name stands for a function of the library, and the options beside it are that function's own: its signature checks
them. A new transformation is a line in `DENOISERS` or `OPTIMIZERS`. What a run knows better than a config is filled in
wherever a function has an argument of that name: ``noise_std``, ``learning_rate`` and ``sharding``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import optax

from dp_rmt.baselines.adam_bc import adam_bc
from dp_rmt.baselines.filters import kalman_filter, low_pass_filter
from dp_rmt.baselines.muon import private_muon
from dp_rmt.baselines.muon_bc import muon_bc
from dp_rmt.baselines.truncation import truncate_rank
from dp_rmt.denoising.first_moment import scale_by_denoised_adam
from dp_rmt.denoising.gates import Kappa, TracyWidom
from dp_rmt.denoising.gradient import denoise_matrices
from dp_rmt.denoising.joins import layers_side_by_side, reads_the_stream, shared_inputs
from dp_rmt.denoising.matrix_view import kernels_are_matrices
from dp_rmt.finetuning.options import NOT_NEGATIVE, POSITIVE, close_to, fitted
from dp_rmt.finetuning.settings import FRACTION, Named

Table = Mapping[str, Callable[..., Any]]


def denoised_adam(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformation:
    """AdamW whose first moment is denoised: `dp_rmt.scale_by_denoised_adam` and what `optax.adamw` has beside Adam."""
    return optax.chain(
        scale_by_denoised_adam(**options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


DENOISERS: Table = {
    "denoise_matrices": denoise_matrices,
    "low_pass_filter": low_pass_filter,
    "truncate_rank": truncate_rank,
}
"""What `config.denoise` names."""

OPTIMIZERS: Table = {
    "adamw": optax.adamw,
    "denoised_adam": denoised_adam,
    "muon": private_muon,
    "kalman_filter": kalman_filter,
    "adam_bc": adam_bc,
    "muon_bc": muon_bc,
}
"""What `config.optimizer` names."""

_MADE: Mapping[str, Table] = {
    "gate": {"kappa": Kappa, "tracy_widom": TracyWidom},
    "optimizer": {"adamw": optax.adamw, "muon": private_muon},
    "others": {"adamw": optax.adamw},
}
"""Options whose value is named, too, and made from options of its own."""

_RULES: Mapping[str, Table] = {
    "join": {"shared_inputs": shared_inputs, "reads_the_stream": reads_the_stream},
    "matrix_rule": {"kernels_are_matrices": kernels_are_matrices, "layers_side_by_side": layers_side_by_side},
}
"""Options whose value is a function that is named."""

_NUMBERS = {
    **dict.fromkeys(("b1", "b2", "beta"), FRACTION),
    **dict.fromkeys(("eps", "consistent_rms"), POSITIVE),
    **dict.fromkeys(("eps_root", "weight_decay"), NOT_NEGATIVE),
}
"""Ranges of numbers that optax itself does not check."""


def name_and_options(named: Named) -> tuple[str, dict[str, Any]]:
    """The two parts of something named.

    >>> name_and_options("adamw"), name_and_options(("truncate_rank", {"rank": 2}))
    (('adamw', {}), ('truncate_rank', {'rank': 2}))
    """
    return (named, {}) if isinstance(named, str) else (named[0], dict(named[1]))


def named_stages(
    denoise: tuple[Named, ...], optimizer: Named, filled_in: dict[str, Any]
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The denoiser and the optimizer. Only the first stage gets the noisy gradient, and so its noise level."""
    later = {name: value for name, value in filled_in.items() if name != "noise_std"}
    stages = [
        _made(named, DENOISERS, later if number else filled_in, f"config.denoise[{number}]")
        for number, named in enumerate(denoise)
    ]
    last = _made(optimizer, OPTIMIZERS, later if denoise else filled_in, "config.optimizer")
    if not stages:
        return optax.identity(), last
    return stages[0] if len(stages) == 1 else optax.chain(*stages), last


def _made(named: Named, table: Table, filled_in: Mapping[str, Any], where: str) -> Any:
    """What a name stands for, called with its options and with what the run fills in."""
    name, options = name_and_options(fitted(Named, named, where))
    if name not in table:
        raise ValueError(f"{where}: there is no {name!r}; {close_to(name, list(table))}")
    arguments, where = _arguments(table[name]), f"{where}: {name}"
    own = [argument for argument in arguments if argument not in ("noise_std", "learning_rate", "sharding")]
    for option in options:
        if option not in own:
            raise ValueError(f"{where} has no option {option!r}; {close_to(option, own)}")
    if "noise_std" in arguments and "noise_std" not in filled_in:
        raise ValueError(
            f"{where} works at the noise level of the gradient itself, which whatever stands before it changes: let it "
            "be the first of config.denoise, or, if it is the optimizer, let config.denoise be ()"
        )
    if missing := [key for key in own if arguments[key].default is inspect.Parameter.empty and key not in options]:
        raise ValueError(f"{where} needs the option {missing[0]!r}")
    values = {
        option: _value(option, value, arguments[option].annotation, filled_in, f"{where}: {option}")
        for option, value in options.items()
    }
    try:
        return table[name](**values, **{key: value for key, value in filled_in.items() if key in arguments})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _value(option: str, value: Any, kind: Any, filled_in: Mapping[str, Any], where: str) -> Any:
    """The value of one option, made from its name where it is named."""
    if option in _MADE:
        return _made(value, _MADE[option], filled_in, where)
    if option in _RULES:
        if value not in _RULES[option]:
            raise ValueError(f"{where}: there is no {value!r}; {close_to(str(value), list(_RULES[option]))}")
        return _RULES[option][value]
    if option in _NUMBERS and value is not None:
        value, check = fitted(float, value, where), _NUMBERS[option]
        if not check.holds(value):
            raise ValueError(f"{where} must {check.wanted}, got {value}")
    return fitted(kind, value, where) if _is_plain(kind) else value


def _arguments(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a function by name; those that `denoised_adam` hands on are its own."""
    found = dict(inspect.signature(function, eval_str=True).parameters)
    if function is denoised_adam:
        del found["options"]
        found = {**_arguments(scale_by_denoised_adam), **found}
    return found


def _is_plain(kind: Any) -> bool:
    """Whether values of a type can be written in a config."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(kind)))
    return typing.get_origin(kind) is typing.Literal or kind in (bool, int, float, str, types.NoneType)
