"""Prompt files as they exist: what is read is what was asked, without an answer; what is no prompt is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import sys
from types import SimpleNamespace

import pytest
from builders import tokenizer
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import DeraError, ModelPair, demo, prompts, sweep
from dera_merge.texts.forms import asked

USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in
                       (("user", "Name a film."), ("assistant", "Alien"), ("assistant", "Heat")))  # fmt: skip
CHAT = "<|user|>Name a film.<|end|><|assistant|>"
HH = "\n\nHuman: Name a film.\n\nAssistant: Which kind?\n\nHuman: A good one.\n\nAssistant:"


@pytest.fixture(scope="module")
def chat():
    return ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).tokenizer


def texts(file, tokenizer):
    return [prompt.text for prompt in prompts.encode(prompts.read(file), tokenizer)]


ROWS = {
    "UltraFeedback": ({"prompt": "Name a film.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]}, CHAT),
    "TRL, chat": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, CHAT),
    "TRL, text": ({"prompt": "Name a film.", "chosen": " Alien", "rejected": " Heat"}, "Name a film."),
    "TRL, implicit": ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, CHAT),
    "TRL, implicit text": ({"chosen": "A film? Alien", "rejected": "A film? Alice"}, "A film?"),
    "HH": ({"chosen": HH + " Alien", "rejected": HH + " Alice"}, HH),
    "TRL, a completion": ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
    "messages": ({"messages": [USER, ANSWER]}, CHAT),
    "messages, an answer in the middle": ({"messages": [USER, ANSWER, USER]}, "<|user|>Name a film.<|end|><|assistant|>Alien<|end|>" + CHAT),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Name a film."}, {"from": "gpt", "value": "Alien"}]}, CHAT),
    "ShareGPT, a system column": ({"system": "Be brief.", "conversations": [{"from": "human", "value": "Name a film."}]},
                                  "<|system|>Be brief.<|end|>" + CHAT),
    "Alpaca": ({"instruction": "Name a film.", "input": "", "output": "Alien"}, CHAT),
    "Alpaca, an input": ({"instruction": "Name", "input": "a film.", "output": "Alien"}, "<|user|>Name\n\na film.<|end|><|assistant|>"),
    "GSM8K": ({"question": "Name a film.", "answer": "#### Alien"}, CHAT),
    "columns of a table": ({"messages": [{**USER, "tool_calls": None}], "prompt": None, "completion": None}, CHAT),
}  # fmt: skip


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("layout", ["lines", "array", "indented", "one after the other", "packed"])
def test_sets_as_they_are_published_are_read_in_every_layout_of_json(form, layout, chat, tmp_path):
    row, wanted = ROWS[form]
    text = {
        "lines": f"{json.dumps(row)}\n\n{json.dumps(row)}\n", "array": json.dumps([row, row]),
        "indented": json.dumps([row, row], indent=4), "packed": f"{json.dumps(row)}\n" * 2,
        "one after the other": f"{json.dumps(row, indent=1)}\n" * 2,
    }[layout]  # fmt: skip
    for name in ("a.json", "a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if layout == "packed" else text.encode())
        assert texts(tmp_path / name, chat) == [wanted, wanted]


def test_a_question_is_plain_text_where_there_is_no_chat_template(tmp_path):
    plain = tokenizer()
    plain.chat_template = None
    (tmp_path / "a.jsonl").write_text('{"question": "w5 w6", "answer": "w7"}\n{"system": "w8", "question": "w5"}')
    assert texts(tmp_path / "a.jsonl", plain) == ["w5 w6", "w8\n\nw5"]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), st.text("a,;\"\n\tb")), min_size=1))
def test_a_table_comes_back_as_a_spreadsheet_wrote_it(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        stream = io.StringIO(newline="")
        csv.writer(stream, dialect).writerows([("prompt", "answer"), *rows])
        (folder / name).write_bytes(stream.getvalue().encode("utf-8-sig"))
        assert prompts.read(folder / name) == [{"prompt": prompt, "answer": answer} for prompt, answer in rows]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "Name a film.\nName a book.\n", "begins with 'Name a film.'.*names the columns"),
        ("a.csv", "prompt,source\nName a film, please.,web\n", "line 2: 3 cells for 2 columns"),
        ("a.csv", 'prompt,source\n"Name a film\n', "line 2: unexpected end of data"),
        ("a.csv", "prompt,source\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n', "line 2: Expecting"),
        ("a.json", '[{"prompt": "a"},\n {"prompt": }]', "line 2: Expecting value"),
        ("a.json", "[]", "holds no prompts"),
        ("a.jsonl", '{"text": "all of it"}', "line 1: expected an object.*it has 'text'"),
        ("a.jsonl", '{"prompt": 3}', '"prompt" is not a text'),
        ("a.jsonl", '"a text"', "expected an object"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "Alien"}]}', "no turn to answer"),
        ("a.jsonl", '{"messages": []}', "no turn to answer"),
        ("a.jsonl", '{"conversations": [{"from": "narrator", "value": "x"}]}', "a turn from 'narrator'"),
        ("a.jsonl", '{"chosen": "Alien", "rejected": "Heat"}', "do not begin with one prompt"),
        ("a.jsonl", '{"instruction": "", "output": "x"}', "is empty"),
        ("a.yaml", "- prompt: Name a film.\n", "no form that is known"),
        ("a.txt", "N\0a\0m\0e\0", "zero bytes"),
        ("a.txt", '[{"prompt": "a"', "line 1: Expecting"),
        ("a.parquet", "no table", None),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(name, text, problem, tmp_path):
    (tmp_path / name).write_text(text)
    if problem is None:  # its bytes do not say parquet
        assert prompts.read(tmp_path / name) == [{"prompt": "no table"}]
        return
    with pytest.raises(DeraError, match=problem):
        prompts.read(tmp_path / name)


def test_lines_of_text_are_prompts_even_where_they_begin_like_json(tmp_path):
    (tmp_path / "a.txt").write_text('[INST] Name a film. [/INST]\n{"prompt": "a"}\n\nplain\n')
    assert [row["prompt"] for row in prompts.read(tmp_path / "a.txt")] == ["[INST] Name a film. [/INST]", "a", "plain"]
    assert len(prompts.read(tmp_path / "a.txt", limit=2)) == 2


@given(st.text(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(min_size=1))
def test_of_two_answers_to_one_prompt_no_word_is_taken_into_it(question, one, other):
    """HH's rows hold a whole conversation each; answers may begin with the same words."""
    opening = f"\n\nHuman: {question}\n\nAssistant:"
    found = asked({"chosen": f"{opening} The {one}", "rejected": f"{opening} The {other}"})
    if "\n\nAssistant:" not in one + other:
        assert found.text == opening


def test_other_columns_stay_with_the_prompts_that_fit_and_one_line_says_what_was_read(chat, caplog):
    rows = [{"question": "Name a film.", "answer": "Alien"}, {"question": "long " * 400, "answer": "no"},
            {"messages": [USER, ANSWER], "level": 3}]  # fmt: skip
    with caplog.at_level(logging.INFO, "dera_merge"):
        kept = prompts.fitting(rows, chat, 64, 256)
    assert [prompt.asked for prompt in kept] == [[USER], [USER]]
    assert prompts.columns(kept) == {
        "question": ["Name a film.", None], "answer": ["Alien", None], "messages": [None, [USER, ANSWER]], "level": [None, 3],
    }  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage() == (
        "2 prompts from `question` (1), `messages` (1); final answers left out of 1; 1 too long for 256 tokens with 64 new ones"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "dera_merge"):
        prompts.fitting(prompts.default(chat)[:2], chat, 8, None)
    assert caplog.records[0].getMessage() == "2 prompts from those that are built in"
    with pytest.raises(DeraError, match="every prompt is too long"):
        prompts.fitting(rows[1:2], chat, 64, 256)


def test_no_name_and_a_packed_file_of_something_else_are_refused_in_one_line(tmp_path):
    with pytest.raises(DeraError, match="no name is given"):
        prompts.read("")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x" * 99)[:20] + b"garbage of some length")
    (tmp_path / "picture.gz").write_bytes(gzip.compress(bytes(range(128, 256))))
    for name, said in (("broken.gz", "cannot be read"), ("picture.gz", "what it holds packed is no text")):
        with pytest.raises(DeraError, match=said) as refusal:
            prompts.read(tmp_path / name)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("says", ["{{ p['text'] }}", "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"])
def test_a_template_that_knows_parts_alone_loses_no_plain_text(says):
    words = tokenizer()
    words.chat_template = "{% for m in messages %}w3 {% for p in m['content'] %}" + says + "{% endfor %}{% endfor %} w4"
    (prompt,) = prompts.encode([{"messages": [{"role": "user", "content": "w5 w9"}]}], words)
    assert prompt.ids == [3, 5, 9, 4]


def test_parts_of_a_turn_that_are_no_text_are_left_to_the_template():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    assert asked({"messages": [{"role": "user", "content": parts}]}).turns == [{"role": "user", "content": parts}]


def test_the_command_line_says_what_it_understood_and_takes_a_limit(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"Review a film, briefly.",1\n' * 1 + "Review a hotel.,2\n" + "word " * 900 + ",3\nReview a book.,4\n")
    done = run("compare", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "--prompts", tmp_path / "a.csv", "--limit", 3,
               "--max-new-tokens", 4, "--with", "none", "-o", tmp_path / "out", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["prompts"] == 2
    assert done.stderr.splitlines()[0].startswith("2 prompts from `question`; 1 too long for")
    assert "--prompts" in run("compare", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "--limit", 3, "-o", tmp_path / "none").stderr


def test_what_is_neither_a_file_nor_a_data_set_is_refused():
    problems = {"nothing.jsonl": "no such file", "some/set": "no such file",
                "some/set:test": "cannot be read" if _has("datasets") else "pip install"}  # fmt: skip
    for name, problem in problems.items():
        with pytest.raises(DeraError, match=problem):
            prompts.read(name)


def _has(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_parquet_is_told_by_its_bytes(tmp_path, chat):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = [row for row, _ in (ROWS["UltraFeedback"], ROWS["TRL, implicit"])]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.bin")
    assert texts(tmp_path / "a.bin", chat) == [CHAT, CHAT]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DeraError, match="no parquet file"):
        prompts.read(tmp_path / "b.parquet")


def test_a_directory_is_a_data_set_with_splits(tmp_path, monkeypatch, chat):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / "set" / f"{split}.jsonl").write_text(f"{json.dumps(ROWS['UltraFeedback'][0])}\n" * count)
    assert texts(f"{tmp_path / 'set'}:test", chat) == [CHAT, CHAT]
    assert len(prompts.read(f"{tmp_path / 'set'}:train[:2]")) == 2
    with pytest.raises(DeraError, match="has the splits train, test"):
        prompts.read(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "asked_for"),
    [
        ("owner/set:test", ("owner/set", None, None, "test")),
        ("hf://datasets/owner/set@v1.0:test_prefs[:500]", ("owner/set", None, "v1.0", "test_prefs[:500]")),
        ("owner/set/main@refs/pr/3:train+test", ("owner/set", "main", "refs/pr/3", "train+test")),
        ("hf://datasets/owner/set", ("owner/set", None, None, None)),
    ],
)
def test_a_data_set_of_the_hub_is_named_with_its_split(name, asked_for, monkeypatch, tmp_path):
    seen = []

    def load_dataset(place, config, *, revision, split):
        seen.append((place, config, revision, split))
        return [{"question": "w5"}, {"question": "w6"}] if split else {"only": [{"question": "w5"}]}

    fake = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert prompts.read(name, limit=1) == [{"question": "w5"}]
    assert seen == [asked_for]


def test_rows_as_they_are_go_to_python_functions(llama, lora):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    from dera_merge import load_reward

    rows = [{"question": f"w{n} w{n + 1}", "answer": str(n)} for n in range(5, 8)] + [{"question": "w5 " * 200, "answer": "x"}]
    result = sweep(pair, rows, [load_reward("length")], [0.0, 1.0], max_new_tokens=4, merged=False, budget=1)
    assert result.settings["prompts"] == 3
