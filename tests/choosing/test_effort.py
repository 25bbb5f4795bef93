"""The study of effort, on pairs that are at hand: accuracy and tokens against λ of what everyone knows."""

import json
import sys
from pathlib import Path

import pytest

from dera_merge import demo

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import study_effort


def test_what_everyone_knows_is_asked_once_each_way():
    rows = study_effort.quantities(100)
    assert len({row["question"] for row in rows}) == len(rows) == 2 * len(study_effort.FACTS)
    assert {"question": "A child asks: how many legs does a spider have? Answer in a few sentences, and end with the number.", "answer": 8} in rows
    assert study_effort.quantities(5) == study_effort.quantities(5) != study_effort.quantities(5, seed=1)


def test_what_it_takes_is_worked_out_from_shapes_alone(capsys):
    study_effort.main(["deepscaler", "--estimate", "--limit", "500"])
    said = capsys.readouterr().out
    # 28 layers, 2 heads of keys and of values of 128 numbers; 1.777 G parameters; 2 bytes a number.
    memory = (2 * 2 * 1.777088e9 + 2 * 32 * 8192 * 28 * 2 * 2 * 128 * 2) / 1e9
    assert f"{memory:.0f} GB at most" in said
    assert "Downloads: 25 GB" in said
    assert "exact DeRa: 3,500 texts, 28.7 M tokens at most" in said
    assert "trained: 2,500 texts" in said


def test_a_study_tables_every_form_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    words = [str(demo.REF), str(demo.ALIGNED_LORA), "-o", str(tmp_path / "out"), "--lambdas", "0,0.5,1", "--limit", "3", "--tokens", "8",
             "--no-bent", "--trained", f"2={demo.ALIGNED_DENSE}"]  # fmt: skip
    study_effort.main(words)
    rows = json.loads((tmp_path / "out" / "effort.json").read_text())["rows"]
    assert [(row["form"], row["lambda"]) for row in rows] == [
        ("exact", 0), ("exact", 0.5), ("exact", 1), ("merged", 0), ("merged", 0.5), ("merged", 1), ("trained", 2)]  # fmt: skip
    for end in (0, 2):  # at the ends both forms are one model, under the same noise
        assert [rows[end][key] for key in ("accuracy", "tokens")] == [rows[end + 3][key] for key in ("accuracy", "tokens")]
    for line in map(json.loads, (tmp_path / "out" / "trained-2" / "texts.jsonl").read_text().splitlines()[1:]):
        assert len(line["token_ids"]) <= 8
    table = (tmp_path / "out" / "effort.md").read_text()
    assert table.count("\n| exact |") == 3
    assert (tmp_path / "out" / "effort.png").is_file()
    monkeypatch.setattr(study_effort, "sweep", None)  # nothing is measured again
    (tmp_path / "out" / "effort.md").unlink()
    study_effort.main(words)
    assert (tmp_path / "out" / "effort.md").read_text() == table
    with pytest.raises(SystemExit, match="another study"):
        study_effort.main([*words, "--tokens", "9"])


@pytest.mark.slow
def test_a_study_of_a_real_pair_with_a_path(tmp_path, lora):
    from make_smollm2_pair import make_reference

    make_reference(tmp_path / "reference")
    adapter = lora(tmp_path / "reference", r=16, lora_alpha=2)
    study_effort.main([str(tmp_path / "reference"), str(adapter), "-o", str(tmp_path / "out"), "--lambdas", "0,0.5,1,2", "--limit", "6",
                       "--tokens", "48", "--path-texts", "16"])  # fmt: skip
    rows = json.loads((tmp_path / "out" / "effort.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["exact"] * 4 + ["merged"] * 4 + ["bent"] * 4
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["tokens"] <= 48 for row in rows)
