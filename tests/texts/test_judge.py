"""Language models as judges: asked over a real connection, both ways, once, at the same time, with nothing secret left behind."""

import json
import re
import threading

import pytest
import torch
from commands import run
from loopback import served

from dera_merge import DeraError, ModelPair, load_reward, sweep
from dera_merge.texts import judge as judging
from dera_merge.texts.exchanges import Exchange, RewardDown

SECRET = "sk-very-secret-key"
PROMPTS = [f"w{n} w{n + 1} w{n + 2}" for n in range(5, 13)]
HOW = {"max_new_tokens": 6, "check": False, "budget": 1}


def completion(said: str, read: int = 10, written: int = 2) -> dict:
    """As OpenAI's API answers."""
    usage = {"prompt_tokens": read, "completion_tokens": written, "prompt_tokens_details": {"cached_tokens": 0}}
    return {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}], "usage": usage}


def both(body: dict) -> tuple[str, str]:
    """The answers in a question of the built-in prompt."""
    asked = body["messages"][0]["content"]
    return tuple(re.search(r"# Answer A\n\n(.*)\n\n# Answer B\n\n(.*)\n", asked, re.DOTALL).groups())


def likes_long(path: str, body: dict) -> dict:
    first, second = (len(answer.split()) for answer in both(body))
    return completion(f"Both have merits, [[C]]? No.\n[[{'A' if first > second else 'B' if second > first else 'C'}]]")


@pytest.fixture(scope="module")
def sides(llama, lora):
    base = llama(0, dtype=torch.float32)
    return base, lora(base)


@pytest.fixture(scope="module")
def pair(sides):
    return ModelPair.from_pretrained(*sides)


def exchanges(*answers: str, rival: str = "w1 w2 w3") -> list[Exchange]:
    return [Exchange("w5", answer, rival=rival) for answer in answers]


@pytest.mark.parametrize(
    ("said", "values"),
    [(likes_long, [1.0, 0.5, 0.0, 0.5]), (lambda path, body: completion("[[A]]"), [0.5, 0.5, 0.5, 0.5]),
     (lambda path, body: completion("I cannot say."), [None, None, None, 0.5])],
    ids=["of-two-minds-never", "place-decides", "no-verdict"],
)  # fmt: skip
def test_a_pair_is_judged_both_ways_and_what_changes_with_the_places_is_a_tie(said, values):
    with served(said) as address:
        reward = load_reward(f"{address}/v1/chat/completions#gpt")
        assert reward.score(exchanges("w1 w2 w3 w4", "w7 w8 w9", "w1", "w1 w2 w3")) == values
        spent = reward.spent()
    assert spent["requests"] == 6, "none of what is its own rival"
    assert spent["prompt_tokens"] == 60
    assert (spent["split"], spent["pairs"]) == ((3, 3) if values[0] == 0.5 else (0, 3 if values[0] else 0))


def test_one_text_is_scored_by_a_prompt_of_ones_own_that_sees_columns(tmp_path):
    (tmp_path / "strict.txt").write_text('Q {prompt} {nothing} A {answer} {"json": 1} gold {gold}. End with [[number]].')
    asked = []

    def scores(path, body):
        asked.append(body["messages"][0]["content"])
        return completion(f"[[1]] or rather [[ {len(asked)}.5 ]]")

    with served(scores) as address:
        address += "/v1/chat/completions#m"
        reward = load_reward(address, judge_prompt=str(tmp_path / "strict.txt"))
        with pytest.raises(DeraError, match="a column gold, which prompt 1 does not have"):
            reward.check([Exchange("w5", "Yes.")])
        texts = [Exchange("w5", "{gold}", {"gold": "{prompt}", "nothing": 0})]
        assert reward.score(texts) == [1.5]
        assert asked == ['Q w5 0 A {gold} {"json": 1} gold {prompt}. End with [[number]].'], "what is filled in is not filled again"
        other = load_reward(address, judge_prompt="score")
        assert other.score(texts) == [2.5]
        assert len({reward.name, other.name, load_reward(address).name}) == 3
        for bad, why in (("{prompt}", "must hold"), ("{answer} {answer_a} {answer_b}", "must hold")):
            (tmp_path / "bad.txt").write_text(bad)
            with pytest.raises(DeraError, match=why):
                load_reward(address, judge_prompt=str(tmp_path / "bad.txt"))
        with pytest.raises(DeraError, match="cannot be read"):
            load_reward(address, judge_prompt="nowhere")
        with pytest.raises(DeraError, match="say which model"):
            load_reward(address.partition("#")[0])


def test_requests_are_under_way_together_and_the_busy_are_asked_again(monkeypatch):
    monkeypatch.setattr(judging, "PAUSES", (0.01, 0.01))
    together, refusals = threading.Barrier(4, timeout=5), [429, 503]

    def busy(path, body):
        if refusals:
            return refusals.pop()
        together.wait()
        return likes_long(path, body)

    with served(busy) as address:
        reward = load_reward(f"{address}/v1/chat/completions#m")
        assert reward.score(exchanges("w1", "w2 w3 w4 w5")) == [0.0, 1.0]
    with pytest.raises(RewardDown, match="does not answer"):
        reward.score(exchanges("w7"))


def test_a_model_that_takes_no_temperature_is_asked_without_one():
    bodies = []

    def picky(path, body):
        bodies.append(body)
        if "temperature" in body:
            return 400, {"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model."}}
        return likes_long(path, body)

    with served(picky) as address:
        assert load_reward(f"{address}/v1/chat/completions#o").score(exchanges("w1", "w2 w3 w4 w5")) == [0.0, 1.0]
    assert bodies[-1].keys() == {"model", "messages", "token"}


@pytest.mark.parametrize("said", [{"choices": []}, {"choices": [{"message": {"content": None}}]}, [1], "no", {"choices": [{"message": {"content": "?"}}]}])
def test_a_judge_that_gives_no_verdict_is_told_of_before_any_work(said):
    with served(lambda path, body: said) as address, pytest.raises(DeraError, match=r"no chat completion|no verdict"):
        load_reward(f"{address}/v1/chat/completions#m").check([Exchange("w5", "Yes.")])


# In a sweep


def test_a_sweep_that_was_interrupted_asks_nothing_twice(pair, tmp_path):
    asked = []

    def counted(path, body):
        asked.append(body["messages"][0]["content"])
        return likes_long(path, body)

    with served(counted) as address:
        spec = f"{address}/v1/chat/completions#m"
        how = {**HOW, "samples": 4, "anchors": [0.0, 1.0], "lams": [0.0, 1.0], "merged": False, "out": tmp_path}
        first = sweep(pair, PROMPTS, [spec], **how)
        assert len(asked) == len(set(asked))
        count = len(asked)
        kept = (tmp_path / "judge.jsonl").read_text()
        (tmp_path / "judge.jsonl").write_text(kept + '{"key": "cut o')
        assert load_reward(spec, folder=tmp_path).score(exchanges("w60 w61")) == [0.0]
        assert load_reward(spec, folder=tmp_path).score(exchanges("w60 w61")) == [0.0]
        assert len(asked) == count + 2, "what follows a line that was cut off is found again"
        count = len(asked)
        lines = (tmp_path / "texts.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "texts.jsonl").write_text("".join(lines[:3]))  # most batches, and some rivals, are lost
        (tmp_path / "sweep.json").unlink(missing_ok=True)
        again = sweep(pair, PROMPTS, [spec], **how, resume=True)
    assert len(asked) == count
    assert again.curve == first.curve
    assert again.judges[0] | {"asked_now": 0} == first.judges[0] | {"asked_now": 0}
    one = next(row for row in first.curve if row["lambda"] == 1.0)
    assert one["reward_ci"][0] - 0.1 <= 0.5 <= one["reward_ci"][1] + 0.1, "the aligned model is even with itself"
    rivals = {a.prompt: a for a in first.answers if a.mode == "rival"}
    assert len(rivals) == len(PROMPTS)
    for a in first.answers:  # the reward is what the judge said of this text and the aligned model's own
        if a.mode == "exact":
            ours, theirs = len(a.text.split()), len(rivals[a.prompt].text.split())
            assert a.rewards[first.judges[0]["name"]] == (ours > theirs) + 0.5 * (ours == theirs)


def test_the_key_comes_from_the_environment_alone_and_is_left_nowhere(sides, tmp_path, monkeypatch):
    """Not by a server that repeats it in its answers and refusals, either."""
    keys, refuses = [], []

    def tactless(path, body):
        keys.append(body["token"])
        if refuses:
            return 401, {"error": {"message": f"Incorrect API key provided: {SECRET}."}}
        return completion(f"You sent {body['token']}. {likes_long(path, body)['choices'][0]['message']['content']}")

    monkeypatch.setenv("DERA_MERGE_JUDGE_KEY", SECRET)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    with served(tactless) as address:
        words = ["sweep", *sides, "--prompts", tmp_path / "prompts.txt", "--reward", f"{address}/v1/chat/completions?key={SECRET}#m",
                 "--max-new-tokens", 4, "--no-merged", "--anchors", "0,1", "-l", "0,1", "--budget", 1]  # fmt: skip
        done = run(*words, "-o", tmp_path / "out")
        refuses.append(True)
        with pytest.raises(RewardDown, match="a token goes into DERA_MERGE_JUDGE_KEY") as refused:
            load_reward(words[words.index("--reward") + 1], folder=tmp_path / "refused").check([Exchange("w5", "Yes.")])
    assert done.returncode == 0, done.stderr
    assert "The judge http://127.0.0.1" in done.stdout
    assert "tokens read" in done.stdout
    assert not (tmp_path / "refused").exists()
    assert set(keys) == {f"Bearer {SECRET}"}
    written = {file: file.read_text(errors="replace") for file in (tmp_path / "out").iterdir()}
    replies = list(map(json.loads, written[tmp_path / "out" / "judge.jsonl"].splitlines()))
    assert "You sent Bearer …." in replies[0]["said"]
    for text in (*written.values(), done.stdout, done.stderr, str(refused.value)):
        assert SECRET not in text
    assert replies[0].keys() == {"key", "said", "usage"}
