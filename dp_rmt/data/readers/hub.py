"""Loads data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def load_hub_dataset(
    name: str, config: str | None = None, *, revision: str | None = None, what: str, advice: str
) -> Mapping[str, Mapping[str, Sequence]]:
    """Loads a data set from the hub, or from its cache on disk.

    Args:
        name: the data set's name on the hub.
        config: its configuration, if it has several.
        revision: a branch other than the main one.
        what: what is being read, for messages.
        advice: how to do without the hub, for messages.

    Returns:
        A mapping split -> column -> values.

    Raises:
        RuntimeError: `datasets` is not installed, or the hub could not be read.
    """
    advice = f"Check the network connection (and HF_HOME, HF_ENDPOINT, HF_TOKEN), or {advice}"
    try:
        import datasets  # imported here, because local files do not need it

        options = {} if revision is None else {"revision": revision}
        return datasets.load_dataset(name, *([] if config is None else [config]), **options)
    except ImportError as error:
        raise RuntimeError(
            f"Reading {what} from the hub needs the package `datasets`: pip install 'dp_rmt[finetune]'. {advice}"
        ) from error
    except Exception as error:  # the hub's client raises dozens of types, most of them not public
        label = repr(name) if config is None else f"{name!r} ({config!r})"
        raise RuntimeError(
            f"Could not load {label} from the Hugging Face hub: {type(error).__name__}: {error}. {advice}"
        ) from error


def load_converted_splits(name: str, *, what: str, advice: str) -> dict[str, Mapping[str, Sequence]]:
    """Loads a data set whose main branch is a loading script, which `datasets` no longer runs.

    The hub keeps a conversion of such a data set on a branch of its own.

    Args:
        name, what, advice: as in `load_hub_dataset`.

    Returns:
        A mapping from "train", "dev" and "test" to column -> values.

    Raises:
        RuntimeError: as `load_hub_dataset`.
    """
    loaded = load_hub_dataset(name, revision="refs/convert/parquet", what=what, advice=advice)
    return {"train": loaded["train"], "dev": loaded["validation"], "test": loaded["test"]}
