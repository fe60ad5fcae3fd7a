"""Every key that a config has, with defaults. The other files of this folder change what they need.

The keys, their types and their docs are written in `dp_rmt.finetuning.settings`; ``python -m experiments.finetune
--help`` lists them.
"""

import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from dp_rmt.finetuning.options import Group, group_of, kinds
from dp_rmt.finetuning.settings import Settings


def get_config() -> ConfigDict:
    """The default: RoBERTa-base on SST-2 from the hub at epsilon 8."""
    return as_config(Settings()).lock()


def as_config(group: Group) -> ConfigDict:
    """A group of settings as an unlocked ConfigDict that takes values of the same types."""
    config = ConfigDict()
    for name, kind in kinds(type(group)).items():
        value = getattr(group, name)
        if isinstance(value, Group):
            config[name] = as_config(value)
        elif isinstance(value, Mapping):
            config[name] = ConfigDict(value)
        else:
            config[name] = FieldReference(value, field_type=_type(kind))
    return config


def _type(kind: Any) -> type:
    """The type that ConfigDict holds the values of an option to; `Settings.from_config` looks closer."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = {_type(part) for part in typing.get_args(kind) if part is not types.NoneType}
        return parts.pop() if len(parts) == 1 else object
    if typing.get_origin(kind) is typing.Literal:
        return str
    return ConfigDict if group_of(kind) else typing.get_origin(kind) or kind
