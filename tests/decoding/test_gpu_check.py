"""The check for a GPU, in little on a CPU: it runs, says so in tables, goes on where it was cut off, and past failures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_parts_in_little(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--sizes", "small", "--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    measure = script.Check.swept
    monkeypatch.setattr(script.Check, "swept", lambda self: 1 / 0)
    script.main()
    first = capsys.readouterr().out
    assert [line for line in first.splitlines() if "–" in line] == [
        "| sweep | – | – |", "–: sweep: ZeroDivisionError: division by zero",
    ]  # fmt: skip
    parts = {row["part"]: row for row in map(json.loads, (tmp_path / "finished.jsonl").read_text().splitlines())}
    right = [row["figures"] for part, row in parts.items() if part.startswith("tokens/")]
    assert len(right) == 9
    assert all(row["texts"] == 1 and abs(row["kl"]) < 1e-9 for row in right)

    monkeypatch.setattr(script.Check, "swept", measure)
    for part in ("compared", "merged", "step", "right", "figures", "floor", "sampling", "calibrated"):
        monkeypatch.setattr(script.Check, part, lambda self, *args: pytest.fail("it was done"))
    script.main()
    assert "–" not in capsys.readouterr().out


def test_what_time_ran_out_for_is_named(script, tmp_path, monkeypatch, capsys):
    command = ["gpu_check.py", "--sizes", "small", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    assert "time was up: call again" in capsys.readouterr().out
    assert not (tmp_path / "finished.jsonl").exists()
