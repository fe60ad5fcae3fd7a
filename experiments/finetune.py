"""The main job: private fine-tuning from a config.

    python -m experiments.finetune --config=configs/quickstart.py --workdir=DIR [--config.privacy.epsilon=3 ...]

`dp-rmt finetune`, which is installed with the library, is the same program; `--help` lists every setting.
"""

from __future__ import annotations

import sys

from dp_rmt.finetuning import console

if __name__ == "__main__":
    console.finetune(sys.argv)
