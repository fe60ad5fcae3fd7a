"""The README's code runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_pieces_in_your_own_project_runs_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    printed = float(capsys.readouterr().out.split()[-1])
    assert 2.9 < printed <= 3.0
    assert abs(float(names["params"]["kernel"].mean()) - 1.0) < 0.3  # the true kernel is all ones
