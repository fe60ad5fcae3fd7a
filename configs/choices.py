"""What stands after the colon in --config=configs/FILE.py:CHOICE,CHOICE."""

from __future__ import annotations

from collections.abc import Collection


def choose(given: str, file: str, **options: Collection[str]) -> list[str]:
    """Reads and checks what was given after the colon.

    Args:
      given: names with commas between them; those left out at the end are the first of their kind.
      file: the config's own, for the error.
      **options: what there is to choose, in order: its noun and the names that it takes.

    Returns:
      One name for each option.

    Raises:
      ValueError: there are too many names, or one is unknown.

    >>> choose("large", "configs/x.py", size=("base", "large"), task=("e2e", "dart"))
    ['large', 'e2e']
    """
    names = given.split(",") if given else []
    names += [next(iter(allowed)) for allowed in list(options.values())[len(names) :]]
    if len(names) > len(options) or any(name not in all_ for name, all_ in zip(names, options.values(), strict=True)):
        kinds = "; ".join(f"{noun} is one of {', '.join(allowed)}" for noun, allowed in options.items())
        raise ValueError(f"--config={file}:{given}: after the colon stands {','.join(options).upper()}, where {kinds}")
    return names
