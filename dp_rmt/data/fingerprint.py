"""The identity of a tokenised data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the SHA-256 of the names, dtypes, shapes and contents of all arrays.

    A run refuses to resume on other data, because with the same noise over another batch the noise would cancel.

    Args:
        arrays: a tokenised data set, name -> array; the order of the names does not matter.

    Returns:
        64 hexadecimal digits.

    >>> fingerprint({"label": np.zeros(3, np.int32)}) == fingerprint({"label": np.zeros(3, np.int64)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}|{little_endian.dtype.str}|{array.shape}|".encode())
        digest.update(little_endian.data)
    return digest.hexdigest()
