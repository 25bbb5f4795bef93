"""Rewards as people have them: what they are given, and what happens where they are wrong, loud, slow or gone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import tokenizer
from commands import run
from loopback import served
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from dera_merge import DeraError, DeraWarning, ModelPair, cli, compare, demo, load_reward, sweep
from dera_merge.texts import endpoints
from dera_merge.texts.exchanges import Exchange, RewardDown
from dera_merge.texts.rewards import as_reward, checked

TURNS = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6 w7"}, {"role": "assistant", "content": "w8"},
         {"role": "user", "content": "w9"}]  # fmt: skip
CHAT = Exchange(TURNS, "w10 w11", {"answer": "w11", "level": 3}, [10, 11])
RAW = Exchange("w6 w7", "w8", {"answer": "w9", "level": 1}, [8])


# Functions: what they are given


def test_trl_functions_get_lists_as_trl_passes_them():
    seen = {}

    def reward(completions, prompts, completion_ids, **kwargs):
        seen.update(completions=completions, prompts=prompts, completion_ids=completion_ids, **kwargs)
        return torch.tensor([0.5] * len(completions))

    assert as_reward(reward).score([CHAT]) == [0.5]
    assert seen == {"completions": [[{"role": "assistant", "content": "w10 w11"}]], "prompts": [TURNS],
                    "completion_ids": [[10, 11]], "answer": ["w11"], "level": [3]}  # fmt: skip
    assert as_reward(reward).score([RAW, RAW]) == [0.5, 0.5]
    assert (seen["completions"], seen["prompts"], seen["answer"]) == (["w8"] * 2, ["w6 w7"] * 2, ["w9"] * 2)

    def accuracy(completions: list, answer: list, **kwargs) -> list:  # as trl.rewards has them
        return [None if gold == "w9" else float(gold in c[0]["content"]) for c, gold in zip(completions, answer, strict=True)]

    assert as_reward(accuracy).score([CHAT, RAW]) == [1.0, None], "None is no reward, as in TRL"

    async def later(completions, **kwargs):
        return [2.0 for _ in completions]

    assert as_reward(later).score([CHAT, RAW]) == [2.0, 2.0]


def verl(level, solution_str, answer, extra_info=None):
    return float(answer in solution_str)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(len, 7), (lambda text: len(text), 7), (lambda asked, said: f"{asked}|{said}".count("w"), 7),
     (lambda completion, answer: float(answer in completion), 1), (lambda prompt, completion, answer: answer in completion, 1),
     (lambda prompt, said, answer: answer in said, 1), (lambda question, response: len(question) < len(response), 0),
     (lambda text, *, level: level, 3), (lambda text, level=9, **more: level + len(more), 4), (lambda text="": len(text), 7),
     (lambda completion, prompt: prompt.count("w"), 5), (lambda x, y, answer: f"{x}|{y}".endswith("w10 w11"), 1),
     (verl, 1)],
)  # fmt: skip
def test_functions_of_a_text_are_given_what_their_parameters_are_called(reward, expected):
    made = as_reward(reward)
    made.check([CHAT])
    assert made.score([CHAT]) == [expected], made.why_not(CHAT)


def test_a_row_without_a_column_that_others_have_gives_none_of_it():
    seen = as_reward(lambda completion, answer: 0.0 if answer is None else 1.0)
    seen.check([CHAT, Exchange("w6", "")])
    assert seen.score([Exchange("w6", "w7")]) == [0.0]


@pytest.mark.parametrize(
    ("reward", "named"),
    [(lambda completion, gold: 1, "wants gold"), (lambda completions, solution: 1, "wants solution"),
     (lambda question, answer: 1, "a column answer"), (lambda a, b, c: 1, "wants a, b, c"),
     (lambda text, *, gold: 1, "wants gold")],
)  # fmt: skip
def test_a_function_that_cannot_be_given_what_it_wants_is_refused_before_work_with_the_forms(reward, named):
    with pytest.raises(DeraError, match=named):
        checked([as_reward(reward)], [type("P", (), {"asked": TURNS, "columns": {"answer": "x", "level": 1}})])


def test_the_whole_conversation_is_seen_by_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "system: w5\n\nuser: w6 w7\n\nassistant: w8\n\nuser: w9"
    assert (CHAT.prompt, CHAT.whole) == (words, words + "\n\nassistant: w10 w11")
    assert tuple(CHAT) == (words, "w10 w11")
    assert (RAW.prompt, RAW.whole) == ("w6 w7", "w6 w7\nw8")
    assert Exchange([{"role": "user", "content": "w6"}], "w8").prompt == "w6", "one question is itself"
    (tmp_path / "program.py").write_text(
        "import sys, json\nprint('loading')\nfor line in sys.stdin:\n    e = json.loads(line)\n"
        "    print(json.dumps({'reward': len(e.get('messages', [])) + 10 * e['level'] + 100 * e['prompt'].count('w')}))\n"
        "print('done in', 3, 's')"
    )
    assert load_reward(f"command:{sys.executable} program.py").score([CHAT, RAW]) == [535.0, 210.0]


def test_files_and_modules_are_found_with_what_lies_beside_them(tmp_path, monkeypatch):
    there = tmp_path / "rewards"
    there.mkdir()
    (there / "helper_of_mine.py").write_text("WORTH = 3\n")
    (there / "datasets.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Judge:\n    worth: int = 2\n"
        "    def of(self, text):\n        from helper_of_mine import WORTH\n        return self.worth * WORTH\n"
        "judge = Judge()\nprint('loaded')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("rewards/datasets.py:judge.of").score([CHAT]) == [6.0]
    assert load_reward(f"{there / 'datasets.py'}:judge.of").score([CHAT]) == [6.0]
    assert "datasets" not in sys.modules or "rewards" not in sys.modules["datasets"].__file__, "no library is hidden"
    for text, why in {"import sys; sys.exit(4)": "SystemExit: 4", "def f(:": "SyntaxError", "x = 1": "no attribute",
                      "import nothing_here": "ModuleNotFoundError", "f = 3": "no function"}.items():  # fmt: skip
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(DeraError, match=why):
            load_reward("bad.py:f")
    with pytest.raises(DeraError, match=r"no file none\.py"):
        load_reward("none.py:f")


def test_what_fails_exits_or_prints_is_a_text_without_a_reward(capsys):
    def odd(text):
        print("scoring", text)
        if "10" in text:
            sys.exit(0)
        return float("nan") if "8" in text else len(text)

    reward = as_reward(odd)
    assert reward.score([CHAT, RAW, ("a", "fine")]) == [None, None, 4.0]
    assert capsys.readouterr().out == "", "stdout is for results"
    assert reward.why_not(CHAT) == "SystemExit: 0"
    assert reward.why_not(RAW) == "odd is nan"
    assert as_reward(lambda completions: [1.0]).score([CHAT, RAW]) == [1.0, 1.0], "asked one by one"
    assert as_reward(lambda completions: 1.0).score([CHAT]) == [None]

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_reward(stop).score([CHAT])


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo starting >&2; echo 'no API key' >&2; echo >&2; exit 3", r"failed \(status 3\): no API key"),
     ("kill -9 $$", "signal 9"), ("echo nan", "is nan"), ("echo hello", "0 rewards for 1 texts"),
     ("echo 1; echo 2; echo why >&2", "2 rewards for 1 texts: why")],
)  # fmt: skip
def test_a_program_that_fails_says_its_last_words_before_any_work(tmp_path, monkeypatch, script, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.sh").write_text(f"cat > /dev/null; {script}\n")
    with pytest.raises(DeraError, match=why):
        load_reward("command:sh judge.sh").check([CHAT])
    with pytest.raises(DeraError, match="cannot be run"):
        load_reward("command:./none").check([CHAT])


# Reward models


def save_plain_tokenizer(folder: Path) -> None:
    made = tokenizer()
    made.chat_template = None
    made.save_pretrained(folder)


@pytest.fixture
def classifier(tmp_path) -> Callable[..., str]:
    def make(**config) -> str:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, **config)).save_pretrained(tmp_path / "rm")
        save_plain_tokenizer(tmp_path / "rm")
        return str(tmp_path / "rm")

    return make


def without(folder: str, *lost: str) -> None:
    file = f"{folder}/model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in lost}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("lost", [["score.weight"], ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]])
def test_a_reward_model_with_a_made_up_tensor_is_refused_by_its_name(classifier, lost):
    folder = classifier(num_labels=1)
    assert len(load_reward(f"model:{folder}").score([CHAT, RAW])) == 2
    without(folder, *lost)
    with pytest.raises(DeraError, match=lost[-1]) as refused:
        load_reward(f"model:{folder}")
    assert all(name in str(refused.value) for name in lost)


def test_a_head_of_another_shape_and_a_causal_model_are_refused_too(classifier):
    folder = classifier(num_labels=1)
    config = json.loads(Path(folder, "config.json").read_text())
    config |= {"id2label": {"0": "A", "1": "B", "2": "C"}, "label2id": {"A": 0, "B": 1, "C": 2}}
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(DeraError, match=r"score\.weight"):
        load_reward(f"model:{folder}#A")
    with pytest.raises(DeraError, match=r"score\.weight"):
        load_reward(f"model:{demo.REF}#LABEL_1")


def test_a_label_that_the_head_does_not_have_is_refused(classifier):
    with pytest.raises(DeraError, match=r"no label GOOD; it has LABEL_0"):
        load_reward(f"model:{classifier(num_labels=1)}#GOOD")
    folder = classifier(id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1})
    with pytest.raises(DeraError, match=r"no label good; it has BAD, GOOD"):
        load_reward(f"model:{folder}#good")
    with pytest.raises(DeraError, match="2 labels"):
        load_reward(f"model:{folder}")


@pytest.mark.parametrize(
    ("kind", "of"),
    [(None, lambda row: row.log_softmax(-1)), ("multi_label_classification", torch.nn.functional.logsigmoid), ("regression", lambda row: row)],
)
def test_what_a_label_is_worth_depends_on_what_the_head_was_trained_for(classifier, kind, of):
    folder = classifier(num_labels=3, problem_type=kind)
    model, tokens = LlamaForSequenceClassification.from_pretrained(folder).eval(), tokenizer()
    found = load_reward(f"model:{folder}#LABEL_2").score([CHAT, RAW])
    for text, value in zip((CHAT, RAW), found, strict=True):
        logits = model(tokens(text.whole, return_tensors="pt")["input_ids"]).logits[0]
        assert value == pytest.approx(float(of(logits)[2].detach()), abs=1e-4)


def test_a_chat_template_gets_all_turns(classifier):
    folder = classifier(num_labels=1)
    Path(folder, "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    model, tokens = LlamaForSequenceClassification.from_pretrained(folder).eval(), tokenizer()
    (value,) = load_reward(f"model:{folder}").score([CHAT])
    logits = model(tokens("w5 w6 w7 w8 w9 w10 w11", return_tensors="pt")["input_ids"]).logits
    assert value == pytest.approx(float(logits.detach()), abs=1e-4)


def test_a_text_that_is_longer_than_the_model_reads_has_no_reward(classifier):
    reward = load_reward(f"model:{classifier(num_labels=1, max_position_embeddings=4)}")
    assert reward.score([CHAT, RAW]) == [None, reward.score([RAW])[0]]
    assert "reads 4" in reward.why_not(CHAT)


def test_an_adapter_is_a_reward_model_with_its_head_and_none_without(classifier, tmp_path, llama):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = llama(vocab_size=64)
    torch.manual_seed(0)
    plain = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    save_plain_tokenizer(tmp_path / "lora")
    (value,) = load_reward(f"model:{tmp_path / 'lora'}").score([RAW])
    ids = tokenizer()(RAW.whole, return_tensors="pt")["input_ids"]
    assert isinstance(adapted, PeftModel)
    assert value == pytest.approx(float(adapted.eval()(ids).logits.detach()), abs=0.02), "the base is stored in bfloat16"
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(DeraError, match=r"score\.weight"):
        load_reward(f"model:{tmp_path / 'lora'}")


# Servers


def worth(text: str) -> float:
    return len(text) / 8  # exact in JSON


def labelled(text: str) -> list[dict]:
    return [{"label": "BAD", "score": -worth(text)}, {"label": "GOOD", "score": worth(text)}]


def answered(path: str, body: dict) -> object:
    """As the servers of these kinds do."""
    if path == "/predict":  # text-embeddings-inference
        return [labelled(*row) for row in body["inputs"]]
    if path == "/one/predict":
        assert body["raw_scores"] is True
        return [[{"label": "LABEL_0", "score": worth(*row)}] for row in body["inputs"]]
    if path == "/v1/classify":  # vLLM
        rows = [{"index": i, "label": "GOOD", "probs": [0.0, worth(text)], "num_classes": 2} for i, text in enumerate(body["input"])]
        return {"object": "list", "data": rows[::-1]}
    if path == "/score":
        pairs = zip(body["text_1"], body["text_2"], strict=True)
        return {"data": [{"index": i, "score": worth(f"{a}\n{b}")} for i, (a, b) in enumerate(pairs)]}
    if path == "/get_reward":  # OpenRLHF
        return {"rewards": [worth(text) for text in body["query"]]}
    if path == "/endpoint":  # Hugging Face's inference
        return [labelled(text) for text in body["inputs"]]
    assert body["columns"]["level"]
    return [worth(f"{a}\n{b}") for a, b in zip(body["prompts"], body["completions"], strict=True)]


@pytest.mark.parametrize("where", ["/predict#GOOD", "/one/predict", "/v1/classify#1", "/score", "/get_reward", "/endpoint#GOOD", "/mine", ""])
def test_servers_of_every_kind_give_their_scores(where):
    texts = [Exchange("w6 w7", "w8" * n, {"level": n}) for n in range(1, 40)]
    with served(answered) as address:
        reward = load_reward(address + where)
        reward.check(texts)
        assert reward.score(texts) == [worth(text.whole) for text in texts]
        if where.endswith(("/predict#GOOD", "/endpoint#GOOD")):
            with pytest.raises(DeraError, match="GOOD"):
                load_reward(address + where.partition("#")[0]).check(texts)
            with pytest.raises(DeraError, match="no score of a label OK; it has BAD, GOOD"):
                load_reward(address + where.replace("GOOD", "OK")).check(texts)


def test_the_score_of_whichever_label_is_likeliest_is_no_reward():
    def likeliest(path, body):
        return [{"label": "GOOD" if "w8" in text else "BAD", "score": 0.9} for text in body["inputs"]]

    with served(likeliest) as address:
        reward = load_reward(address)
        assert reward.score([RAW]) == [0.9]
        assert "say which is the reward" in reward.why_not(("w6", "w9"))


@pytest.mark.parametrize(
    ("said", "why"),
    [(b"<html>hello</html>", "not with JSON: <html>hello"), ([1.0, 2.0], "2 scores for 1 texts"), ({"detail": "no"}, "no list of scores"),
     (["high"], "no number: 'high'"), ([None], "no number"), ([float("nan")], "no number"), (b"", "not with JSON"), ([{"label": "A"}], "no score"),
     (404, "status 404 Not Found.*is the address right"), (401, "a token goes into DERA_MERGE_REWARD_TOKEN"), (422, "status 422.*sorry"),
     (302, "status 302"), (500, "status 500")],
)  # fmt: skip
def test_a_server_that_is_wrong_is_told_of_in_a_line_before_any_work(said, why):
    with served(lambda path, body: said) as address, pytest.raises(DeraError, match=why) as told:
        load_reward(f"{address}/judge?key=secret").check([CHAT])
    assert "secret" not in str(told.value)


def test_a_server_that_is_slow_is_waited_for_with_fewer_texts_and_one_that_hangs_is_not(monkeypatch):
    monkeypatch.setattr(endpoints, "PATIENCE", 0.5)
    asked = []

    def slow(path, body):
        asked.append(len(body["inputs"]))
        time.sleep(0.1 * len(body["inputs"]))
        return [worth(text) for text in body["inputs"]]

    texts = [Exchange("w6", "w8" * n) for n in range(1, 13)]
    with served(slow) as address:
        assert load_reward(address).score(texts) == [worth(text.whole) for text in texts]
        assert asked[0] == 12
        assert max(asked[1:]) <= 6
    with served(lambda path, body: time.sleep(2) or [1.0]) as address:
        begun = time.monotonic()
        with pytest.raises(RewardDown, match=r"no answer in 0\.5 seconds"):
            load_reward(address).score(texts[:2])
        assert time.monotonic() - begun < 2


def test_a_busy_server_is_asked_again_and_one_that_goes_ends_the_run(monkeypatch):
    monkeypatch.setattr(endpoints, "PAUSES", (0.01, 0.01))
    statuses = [503, 429]
    with served(lambda path, body: statuses.pop() if statuses else {"rewards": [1.0]}) as address:
        reward = load_reward(f"{address}/get_reward")
        assert reward.score([RAW]) == [1.0]
    with pytest.raises(RewardDown, match="does not answer: .*refused"):
        reward.score([RAW])


def test_where_nobody_was_there_from_the_first_nobody_waits_and_waiting_is_told_once(monkeypatch):
    waits, statuses = [], [503, 503, 503]
    monkeypatch.setattr(endpoints.time, "sleep", waits.append)
    with served(lambda path, body: {"rewards": [1.0]}) as gone:
        pass
    with pytest.raises(RewardDown, match="does not answer: .*refused"):
        load_reward(f"{gone}/get_reward").score([RAW])
    assert not waits
    monkeypatch.setattr(endpoints, "PAUSES", (0.5, 3.0, 4.0))
    with served(lambda path, body: statuses.pop() if statuses else {"rewards": [1.0]}) as address:
        reward = load_reward(f"{address}/get_reward")
        with pytest.warns(DeraWarning, match=r"does not answer \(status 503 .*\); asking again for 7 s") as told:
            assert reward.score([RAW]) == [1.0]
        assert (waits, len(told)) == ([0.5, 3.0, 4.0], 1)
    with pytest.warns(DeraWarning, match="refused"), pytest.raises(RewardDown, match="refused"):
        reward.score([RAW])  # it was there
    assert waits[3:] == [0.5, 3.0, 4.0]


def test_a_text_that_a_server_refuses_is_the_only_one_without_a_reward():
    def picky(path, body):
        return 413 if any("w8" in text for text in body["inputs"]) else [1.0] * len(body["inputs"])

    with served(picky) as address:
        assert load_reward(address).score([CHAT, RAW, ("a", "b"), ("a", "w8")])[2:] == [1.0, None]


def test_a_token_goes_along_and_no_password_is_taken_in_an_address(monkeypatch):
    monkeypatch.setenv("DERA_MERGE_REWARD_TOKEN", "abc")
    tokens = []
    with served(lambda path, body: tokens.append(body["token"]) or [1.0]) as address:
        reward = load_reward(f"{address}/x?api_key=hidden")
        assert reward.score([RAW]) == [1.0]
    assert tokens == ["Bearer abc"]
    assert "hidden" not in reward.name
    for bad in ("http://user:pass@localhost/x", "http://", "http://localhost:99999/x"):
        with pytest.raises(DeraError) as refused:
            load_reward(bad)
        assert "pass@" not in str(refused.value)


# In sweep and compare


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)


ROWS = [{"prompt": f"The hotel {n}", "answer": n} for n in "AB"]
HOW = {"max_new_tokens": 4, "anchors": [0.0, 1.0], "merged": False, "check": False, "budget": 1}


def test_sweep_gives_rewards_the_columns_and_turns_of_the_prompts(pair):
    seen = []

    def trl(prompts, completions, answer, **kwargs):
        seen.extend(zip(prompts, answer, strict=True))
        return [float(len(c)) for c in completions]

    result = sweep(pair, ROWS, [trl], [0.0, 1.0], **HOW)
    assert set(seen) == {("The hotel A", "A"), ("The hotel B", "B")}
    assert [p["reward"] for p in result.points] == [
        sum(len(a.text) for a in result.answers if a.lam == p["lambda"]) / 2 for p in result.points
    ]
    with pytest.raises(DeraError, match="wants gold"):
        sweep(pair, ROWS, [lambda completion, gold: 1.0], [0.0, 1.0], **HOW)


def test_another_reward_in_the_place_of_a_finished_sweep_keeps_its_texts(pair, tmp_path):
    sweep(pair, ROWS, ["length"], [0.0, 1.0], **HOW, out=tmp_path).save(tmp_path)
    before = (tmp_path / "texts.jsonl").read_bytes()
    sweep(pair, ROWS, [len], [0.0, 1.0], **HOW, out=tmp_path)
    assert (tmp_path / "texts.1.jsonl").read_bytes() == before != (tmp_path / "texts.jsonl").read_bytes()
    with pytest.raises(DeraError, match="of another call"):
        sweep(pair, ROWS, ["lexicon"], [0.0, 1.0], **HOW, out=tmp_path, resume=True)


def test_a_server_that_goes_in_the_middle_keeps_the_texts(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "PAUSES", (0.01,))
    left = [3]  # answers: the check, and two batches

    def dying(path, body):
        left[0] -= 1
        return 503 if left[0] < 0 else {"rewards": [1.0] * len(body["query"])}

    rows = [{"prompt": f"The hotel {n}"} for n in range(10)]
    how = {**HOW, "anchors": [0.0, 0.5, 1.0, 2.0], "out": tmp_path}
    with served(dying) as address:
        reward = load_reward(f"{address}/get_reward")
        with pytest.raises(RewardDown, match="--resume"):
            sweep(pair, rows, [reward], [0.0, 2.0], **how)
        kept = (tmp_path / "texts.jsonl").read_text().count("token_ids")
        left[0] = 1000
        assert len(sweep(pair, rows, [reward], [0.0, 2.0], **how, resume=True).answers) == 40 > kept > 0


def test_compare_looks_at_a_reward_before_the_work_and_loses_nothing_at_the_end(pair):
    how = {"max_new_tokens": 4, "extras": ("coupled",)}
    with pytest.raises(DeraError, match="cannot be run"):
        compare(pair, [0.5], ROWS, reward="command:./none", **how)
    rows = compare(pair, [0.5], ROWS, reward=lambda completion, answer: len(completion) * ord(answer), **how)
    assert rows.at(0.5)["coupled"]["reward"]["exact"] > 0
    with (
        pytest.warns(UserWarning, match="fails on a first text: ZeroDivisionError"),
        pytest.warns(UserWarning, match="fails on every text: ZeroDivisionError"),
    ):
        row = compare(pair, [0.5], ROWS, reward=lambda text: 1 / 0, **how).at(0.5)
    assert (row["coupled"]["reward"], row["coupled"]["reward_failed"]) == (None, 2)


def test_compare_ends_as_an_error_where_a_reward_failed_on_every_text_and_keeps_the_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "bad.py").write_text("def reward(text): return 1 / 0\n")
    words = ["compare", demo.REF, demo.ALIGNED_LORA, "-l", 0.5, "--prompts", tmp_path / "q.jsonl", "--max-new-tokens", 4,
             "--with", "coupled", "--reward", f"{tmp_path / 'bad.py'}:reward", "-o", tmp_path / "out", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dera-merge", *map(str, words)])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr()
    assert said.out == ""
    assert "fails on every text, so" in said.err
    assert (tmp_path / "out" / "report.json").is_file()


def test_json_is_all_there_is_on_stdout_whatever_a_reward_does(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import atexit, os, sys\nprint('loading')\natexit.register(lambda: print('bye'))\n"
        "def reward(text):\n    os.system('echo from a program')\n    print('scoring')\n    sys.__stdout__.write('raw')\n"
        "    return len(text)\ndef leaves(text): sys.exit(0)\n"
    )
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["sweep", demo.REF, demo.ALIGNED_LORA, "--prompts", "q.jsonl", "--anchors", "0,1", "--max-new-tokens", 4,
             "--no-merged", "--budget", 1, "--json"]  # fmt: skip
    done = run(*words, "--reward", "loud.py:reward", "-o", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]
    done = run(*words, "--reward", "loud.py:leaves", "-o", "b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the reward loud.py:leaves fails on every text: SystemExit: 0" in done.stderr
