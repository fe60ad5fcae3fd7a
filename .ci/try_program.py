"""What a stranger does first with an installed dp_rmt[finetune]: run outside any checkout.

    python try_program.py

Ends with an error unless the console script lists its commands and its settings, answers a misspelt setting quickly
and in one line, and every module of the package can be imported.
"""

import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import dp_rmt

SCRIPT = Path(sys.executable).with_name("dp-rmt")


def dp_rmt_says(*arguments: str) -> tuple[int, str, float]:
    """Exit status, both outputs, seconds."""
    start = time.perf_counter()
    ended = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=120)
    return ended.returncode, ended.stdout + ended.stderr, time.perf_counter() - start


assert "site-packages" in dp_rmt.__file__, f"{dp_rmt.__file__} is not the installed package"
status, said, _ = dp_rmt_says("--help")
assert status == 0, said
assert "dp-rmt finetune" in said, said
status, said, _ = dp_rmt_says("finetune", "--help")
assert "l2_clip_norm" in said, said
seconds = []
for _ in range(3):  # the first reads the files of the libraries for the first time
    status, said, took = dp_rmt_says("finetune", "--config.privacy.epsilonn=3")
    seconds.append(took)
    assert status != 0, said
    assert "epsilonn" in said, said
    assert "Traceback" not in said, said
print(f"a misspelt setting is answered in {min(seconds):.2f} s: {said.strip()}")
for module in pkgutil.walk_packages(dp_rmt.__path__, "dp_rmt."):
    importlib.import_module(module.name)
print("every module can be imported")
