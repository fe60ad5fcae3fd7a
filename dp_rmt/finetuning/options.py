"""An option, written once: a field of a frozen dataclass, with its default, its type, its doc and its check.

Nothing here imports JAX, so that a mistyped key is answered before anything heavy is loaded.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

GroupT = TypeVar("GroupT", bound="Group")


class Check(NamedTuple):
    """What a value must be, besides being of its type.

    Attributes:
      wanted: completes "the option must ...".
      holds: whether a value (never None) passes the check.
      hint: advice for a value that does not, where it is not obvious.
    """

    wanted: str
    holds: Callable[[Any], bool]
    hint: str = ""


POSITIVE = Check("be above 0", lambda x: x > 0)
NOT_NEGATIVE = Check("not be negative", lambda x: x >= 0)


def option(default: Any, doc: str, check: Check | None = None) -> Any:
    """A field of a `Group`: the annotation is its type, where a Literal lists the choices.

    Args:
      default: the default value.
      doc: what the option does, in one sentence.
      check: which values of its type can be used; None for all.
    """
    metadata = {"doc": doc, "check": check}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(kind: type[Group], doc: str) -> Any:
    """A field of a `Group` that is a group of its own, with the defaults of its options."""
    return dataclasses.field(default_factory=kind, metadata={"doc": doc, "check": None})


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that belong together; every value is checked when a group is made, whoever makes it.

    Raises:
      ValueError: a value is not of its type or out of its range; the message names the option.
    """

    WHERE: ClassVar[str] = "config"
    """The name of the group in messages."""
    REFUSED: ClassVar[Mapping[str, str]] = {}
    """What users ask for and do not get: the reason by the name of the option that it would be."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(type(self), field.name, getattr(self, field.name), f"{self.WHERE}.{field.name}")
            object.__setattr__(self, field.name, value)

    def as_dict(self) -> dict[str, Any]:
        """The options as nested dictionaries."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.as_dict() if isinstance(value, Group) else value for name, value in values.items()}


def kinds(of: type[Group]) -> dict[str, Any]:
    """The type of every option of a group, by name."""
    if of not in _KINDS:
        hints = typing.get_type_hints(of)
        _KINDS[of] = {field.name: hints[field.name] for field in dataclasses.fields(of)}
    return _KINDS[of]


_KINDS: dict[type[Group], dict[str, Any]] = {}  # a cache: reading the annotations of all groups takes 0.1 s


def group_of(kind: Any) -> type[Group] | None:
    """The group that an option of this type is, or may be; None for an option that holds a value."""
    for part in (kind, *typing.get_args(kind)):
        if isinstance(part, type) and issubclass(part, Group):
            return part
    return None


def checked(of: type[Group], name: str, value: Any, where: str) -> Any:
    """The value as the option `name` of a group holds it.

    Raises:
      ValueError: the value is not of the option's type, or out of its range.
    """
    value = fitted(kinds(of)[name], value, where)
    check = next(field for field in dataclasses.fields(of) if field.name == name).metadata["check"]
    if check is not None and value is not None and not check.holds(value):
        raise ValueError(f"{where} must {check.wanted}, got {_shown(value)}{check.hint}")
    return value


def replaced(group: GroupT, changes: Any, where: str = "config") -> GroupT:
    """The group with some options changed.

    Args:
      group: the group to begin with.
      changes: new values by name, nested or dotted.
      where: the name of the group in messages.

    Raises:
      ValueError: there is no such option, or its value cannot be used.
    """
    if not hasattr(changes, "items"):
        raise ValueError(f"{where} is {changes!r}; give the keys that differ, as in {{'privacy': {{'epsilon': 3.0}}}}")
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        check_name(type(group), name, where)
        inner, here = group_of(kinds(type(group))[name]), f"{where}.{name}"
        if rest:
            if inner is None:
                raise ValueError(f"{here} has no keys below it, such as {rest!r}; give {name} as a whole")
            value = {rest: value}
        if inner is None or value is None or isinstance(value, inner):
            value = checked(type(group), name, value, here)
        else:
            value = replaced(getattr(group, name) or inner(), value, here)
        group = dataclasses.replace(group, **{name: value})
    return group


def check_name(of: type[Group], name: str, where: str) -> None:
    """Raises ValueError unless a group has an option of this name; the message suggests one and lists all.

    For what is refused on purpose it says why.
    """
    if name in of.REFUSED:
        raise ValueError(f"{where}.{name}: {of.REFUSED[name]}")
    if name not in kinds(of):
        raise ValueError(f"{where}.{name}: there is no such key; {close_to(name, list(kinds(of)))}")


def close_to(name: str, names: list[str]) -> str:
    """Advice for a name that is none of these.

    >>> close_to("epsilonn", ["delta", "epsilon"])
    "did you mean 'epsilon'? Choose from delta, epsilon"
    """
    found = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {found[0]!r}? Choose" if found else "choose"
    return f"{meant} from {', '.join(names)}"


def fitted(kind: Any, value: Any, where: str) -> Any:
    """A value as an option of this type holds it: lists become tuples, and integers floats where a float is wanted.

    Args:
      kind: the type, as an annotation says it.
      value: what was given.
      where: the option, for the message.

    Raises:
      ValueError: the value is not of the type.

    >>> fitted(float | None, 3, "config.privacy.delta"), fitted(tuple[int, ...], [1, 2], "config.data.length_groups")
    (3.0, (1, 2))
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        for part in inner:
            try:
                return fitted(part, value, where)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, tuple | list):
        parts = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(parts) == len(value):
            return tuple(
                fitted(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True))
            )
    elif origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif origin is not None and issubclass(origin, Mapping) and hasattr(value, "items"):
        return _plain(value)
    elif kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, wanted) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError(f"{where} must be {described(kind)}, got {_shown(value)}")


def described(kind: Any) -> str:
    """A type in words.

    >>> described(int | None), described(tuple[float, ...]), described(Literal["flat", "automatic"])
    ('an integer or None', 'a tuple of which each is a number', 'one of flat, automatic')
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}" if len(inner) > 1 else repr(inner[0])
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a tuple of which each is {described(inner[0])}"
        return f"({', '.join(described(part) for part in inner)})"
    words = {bool: "True or False", int: "an integer", float: "a number", str: "text", types.NoneType: "None"}
    return words.get(kind, "a dictionary")


def parsed(kind: Any, text: str, where: str) -> Any:
    """The value of an option that a command line gives as text.

    Args:
      kind: the option's type.
      text: the text after "=", a Python literal or plain text.
      where: the option, for the message.

    Raises:
      ValueError: the text is no value of the type.

    >>> parsed(float, "inf", "config.privacy.epsilon"), parsed(tuple[str, ...], "()", "config.denoise")
    (inf, ())
    """
    for value in _readings(text):
        try:
            return fitted(kind, value, where)
        except ValueError:
            continue
    return fitted(kind, text, where)


def walk(of: type[Group], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """``(dotted key, type, field)`` of every option of a group and of the groups in it."""
    for field in dataclasses.fields(of):
        kind = kinds(of)[field.name]
        inner = group_of(kind)
        if inner is None:
            yield prefix + field.name, kind, field
        else:
            yield from walk(inner, f"{prefix}{field.name}.")


def _readings(text: str) -> Iterator[Any]:
    if text.lower() in ("true", "false"):
        yield text.lower() == "true"
    for read in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError):
            yield read(text)


def _plain(value: Any) -> Any:
    """The value with other mappings and lists replaced by Python's dictionaries and tuples."""
    if hasattr(value, "items"):
        return {name: _plain(item) for name, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
    return f"{value}" if isinstance(value, float) else f"{value!r}"
