"""Answers that are checked: what counts as the answer of a text, and when it is the one in the prompts' column."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dera_merge import DeraError, load_reward
from dera_merge.texts.exchanges import Exchange


def earned(spec: str, text: str, **columns: object) -> float | None:
    (value,) = load_reward(spec).score([Exchange("w1", text, columns)])
    return value


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She sold 72 clips in all.", GSM8K, 1), ("That makes $72.00.", GSM8K, 1), ("48 and 24: 72, not 71", GSM8K, 0),
        ("#### 72\n\nNext question: 5", GSM8K, 1), ("Thus \\boxed{72}. (It took 3 steps.)", GSM8K, 1),
        ("no idea", GSM8K, 0), ("", GSM8K, 0), ("1,234,567 people", "1234567", 1), ("x = -5", -5, 1), ("10-5", -5, 0),
        ("\\(\\boxed{\\dfrac{1}{2}}\\)", 0.5, 1), ("a half, 1/2", "0.5", 1), ("−4 °C", "-4", 1), ("50 %", 50, 1), ("70kg", "70", 1),
        ("CO2", "2", 0), ("5 or 6", ["5", "6"], 1), ("7", ["5", "6"], 0), ("<think>so 3, no, 4</think> It is 5.", 5, 1),
        ("<think>so 5", 5, 0), ("thinking 4 </think>5", 5, 1), ("\\boxed{3", 3, 1), ("9" * 9000 + " is 7", 7, 1),
    ],
)  # fmt: skip
def test_the_number_that_a_text_ends_at_is_compared_as_a_number(text, answer, right):
    assert earned("answer:number", text, answer=answer) == right


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{:,}", "{}", "{}.00", "${:,}", "\\boxed{{{:,}}}", "it is {} apples.", "**{}**"]))
def test_a_number_is_found_however_it_is_written(number, form):
    text = form.format(number).replace("$-", "-$")
    assert earned("answer:number", f"From 3 and 5 follows {text}", solution=f"so \\boxed{{{number}}}") == 1
    assert earned("answer:number", text, answer=number + 1) == 0
    assert earned("answer:number", f"{text} / 7", answer=str(Fraction(number, 7))) == (form in ("{:,}", "{}", "{}.00", "${:,}"))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so \\boxed{2\\sqrt{3}}", "2\\sqrt{3}", 1), ("so $\\boxed{ 2 \\sqrt{3} }$", "\\boxed{2\\sqrt{3}}", 1),
        ("\\boxed{90^\\circ}", "90", 1), ("\\boxed{\\text{east}}", "\\text{east}", 1), ("\\boxed{72\\text{ cm}}", "72", 1),
        ("first \\boxed{1}, no: \\boxed{x_{2}+1}", "x_{2}+1", 1), ("2", "2", 0), ("\\boxed{5 6}", "56", 0),
        ("\\boxed{\\left(1,\\,2\\right)}", "(1, 2)", 1), ("\\boxed{1{,}000}", 1000, 1),
    ],
)  # fmt: skip
def test_what_is_boxed_alone_counts(text, answer, right):
    assert earned("answer:boxed", text, answer=answer) == right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("B", "B", 1), ("(b)", "B", 1), ("B. It is warm.", "B", 1), ("The answer is (C).", "C", 1), ("Answer: **D**", "d.", 1),
        ("(A) is wrong, hence (B)", "B", 1), ("\\boxed{\\text{C}}", 2, 1), ("A dog barks", "A", 0), ("the answer is a dog", "A", 0),
        ("Answer: b", "B", 1), ("b) y", "B", 1), ("the answer is a.", "A", 1), ("Answer: a) milk", "A", 1), ("answers vary", "S", 0),
        ("Bread", "B", 0), ("The correct option is C) 3 m", "C", 1), ("Answer: B", "A", 0),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice_is_told_from_words(text, answer, right):
    assert earned("answer:choice", text, answerKey=answer) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [("Here:\n```python\nraise SystemExit(1)\n```\n", 1), ("```\nfor x in:\n```", 0), ("x = 1", 0), ("```js\nlet x\n```", 0),
     ("```py\nx = 1", 0), ("~~~python\n    x = 1\n~~~", 1), ("```python\n```", 0), ("```python\n" + "(" * 10_000 + "\n```", 0),
     ("```python\nx = 1\n```\nand\n```python\ny =\n```", 0)],
)  # fmt: skip
def test_code_is_parsed_and_never_run(text, right):
    assert earned("answer:python", text) == right


def test_prompts_without_a_right_answer_are_told_of_before_any_work():
    reward = load_reward("answer:number")
    for columns, why in [({}, "has no other columns"), ({"level": 3}, "other columns are level"), ({"answer": "none"}, "a number in column answer.*'none'"),
                         ({"answer": True}, "a number"), ({"answer": ["1", "x"]}, "a number")]:  # fmt: skip
        with pytest.raises(DeraError, match=why):
            reward.check([Exchange("w1", "Yes.", {"answer": "3"}), Exchange("w1", "Yes.", columns)])
    load_reward("answer:number#gold").check([Exchange("w1", "Yes.", {"gold": "3", "answer": "x"})])
    with pytest.raises(DeraError, match="the column gold"):
        load_reward("answer:number#gold").check([Exchange("w1", "Yes.", {"answer": "3"})])
    with pytest.raises(DeraError, match="answer:number, answer:boxed, answer:choice or answer:python"):
        load_reward("answer:nothing")
    with pytest.raises(DeraError, match="takes no column"):
        load_reward("answer:python#answer")


def test_a_pair_of_texts_without_the_right_answer_is_told_what_to_give_instead():
    with pytest.raises(DeraError, match="Exchange.*\"gold\""):
        load_reward("answer:number#gold").score([("w1", "It is 7.")])
    assert load_reward("answer:python").score([("w1", "Yes.")]) == [0]
    assert load_reward("length").score([("w1", "It is 7.")]) == [3]


def test_texts_that_repeat_themselves_are_checked_in_no_time():
    began = time.monotonic()
    for piece in ("\\boxed{", "```python\n", "1,", "1/", "{", "$", "(A", "**", "#### ", "<think>", "\\frac{1", "-" , "1e"):
        for kind in ("number", "boxed", "choice", "python"):
            earned(f"answer:{kind}", piece * 8000, answer="A" if kind == "choice" else 3)
    assert time.monotonic() - began < 5
