"""Where the record of a benchmark of steps lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_rmt.files import write_atomically


def write(record: Mapping[str, Any], folder: str, kind: str = "") -> Path:
    """Writes a record into a folder, and returns its file.

    Args:
      record: with the model, the dtype, the shapes and the machine.
      folder: is made if it is missing.
      kind: end of the file's name.
    """
    device = re.sub(r"\W+", "-", record["machine"]["device_kind"]).lower()
    shapes = record["shapes"]
    sizes = f"b{shapes['batch_size']}-s{shapes['sequence_length']}-l{shapes['config']['num_layers']}"
    path = Path(folder) / f"{record['model']}-{device}-{record['dtype']}-{sizes}{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path
