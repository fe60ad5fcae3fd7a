"""What several runs on the same data have spent together (`dp_rmt.finetuning.sweep.spending_table`).

    python -m experiments.spent --workdirs=runs/first,runs/second

`dp-rmt spent`, which is installed with the library, is the same program.
"""

from __future__ import annotations

import sys

from dp_rmt.finetuning import console

if __name__ == "__main__":
    console.spent(sys.argv)
