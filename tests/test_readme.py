"""The README's code runs as it stands; the call that needs a model from the hub is made without one."""

import inspect
import re
from pathlib import Path
from unittest.mock import create_autospec

import dp_rmt
from dp_rmt.finetuning.shorthand import settings_from

README = Path(__file__).parents[1] / "README.md"
CALL, PIECES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_first_call_is_understood(monkeypatch, tmp_path):
    """Of its settings all are known, and of the result it uses only what there is."""
    calls = []

    def finetune(**arguments):
        inspect.signature(original).bind(**arguments)
        calls.append(arguments)
        return run

    original = dp_rmt.finetune
    run = create_autospec(dp_rmt.Finetuned, instance=True, scores={}, privacy={"epsilon": 3.0})
    monkeypatch.setattr(dp_rmt, "finetune", finetune)
    monkeypatch.setattr("dp_rmt.environment.prepare", lambda: None)
    exec(compile(CALL, str(README), "exec"), {})
    (call,) = calls
    (tmp_path / call["train"]).write_text("text,label\ngood,positive\nbad,negative\n", encoding="utf-8")
    others = {key: value for key, value in call.items() if key not in ("model", "train", "epsilon", "workdir")}
    settings = settings_from(call["model"], tmp_path / call["train"], call["epsilon"], others)
    assert (settings.privacy.epsilon, settings.train.num_steps) == (3.0, others["num_steps"])


def test_pieces_in_your_own_project_runs_and_learns(capsys):
    names: dict = {}
    exec(compile(PIECES, str(README), "exec"), names)
    printed = float(capsys.readouterr().out.split()[-1])
    assert 2.9 < printed <= 3.0
    assert abs(float(names["params"]["kernel"].mean()) - 1.0) < 0.3  # the true kernel is all ones
