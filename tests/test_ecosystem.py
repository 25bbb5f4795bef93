"""Other people's tools take the mixture for an ordinary transformers model. Slow: they are large, and installed for this."""

import json

import pytest
import torch

from dera_merge import ModelPair, demo

pytestmark = [pytest.mark.slow, pytest.mark.core]

QUESTIONS = [
    {"question": "The opening scene is", "choices": [" dull", " delightful"]},
    {"question": "In my view, the acting is", "choices": [" tedious", " wonderful"]},
    {"question": "The hotel has", "choices": [" six floors", " a lovely view"]},
    {"question": "I would not", "choices": [" go again", " miss it"]},
]


@pytest.fixture(scope="module")
def pair():
    return ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)


def test_the_evaluation_harness_runs_a_task(pair, tmp_path):
    """A task made here, on local data; each log-likelihood against the mixture computed in float64."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps({**q, "label": 1}) for q in QUESTIONS))
    (tmp_path / "praise.yaml").write_text(
        f"task: praise\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: label\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    found = {}
    for lam in (0.0, 2.0):
        exact = pair.exact(lam)
        model = HFLM(pretrained=exact, tokenizer=pair.tokenizer, batch_size=2)
        result = lm_eval.simple_evaluate(
            model, tasks=["praise"], task_manager=TaskManager(include_path=str(tmp_path)), log_samples=True, bootstrap_iters=0
        )
        found[lam] = result["results"]["praise"]["acc,none"]
        right = []
        for sample, entry in zip(sorted(result["samples"]["praise"], key=lambda s: s["doc_id"]), QUESTIONS, strict=True):
            scores = [score[0][0] if isinstance(score[0], (list, tuple)) else score[0] for score in sample["resps"]]
            expected = [log_likelihood(pair, exact, entry["question"], choice, lam) for choice in entry["choices"]]
            assert scores == pytest.approx(expected, abs=1e-3)
            right.append(expected[1] > expected[0])
        assert found[lam] == sum(right) / len(right)
    assert found[0.0] <= found[2.0]  # the aligned model was trained to praise


@torch.no_grad()
def log_likelihood(pair, exact, context, choice, lam):
    tokens = pair.tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = pair.tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    ref, aligned = (model(torch.tensor([whole])).logits[0].double() for model in (exact.ref, exact.aligned))
    log_p = torch.log_softmax((1 - lam) * ref + lam * aligned, -1)
    return sum(log_p[place - 1, whole[place]].item() for place in range(len(tokens), len(whole)))


def test_distillation_takes_it_as_the_teacher(pair, tmp_path):
    """TRL's GKD on the demo pair: after a few steps the student is nearer to exact DeRa at λ=2 than it was."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = pair.exact(2.0), pair.merged(0.0)
    answer = {"role": "assistant", "content": "We stayed there for six nights. The porter was more friendly than I had expected."}
    chats = [[*prompt["messages"], answer] for prompt in demo.prompts()[:8]]
    ids = pair.tokenizer.apply_chat_template(chats[0], return_tensors="pt", return_dict=True)["input_ids"]
    prompt = len(pair.tokenizer.apply_chat_template(chats[0][:-1], add_generation_prompt=True, return_dict=True)["input_ids"])

    @torch.no_grad()
    def distance():
        log_p, log_q = (torch.log_softmax(model(ids).logits[0, prompt - 1 : -1].double(), -1) for model in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    before = distance()
    options = GKDConfig(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=4, learning_rate=1e-4, lmbda=0.0, beta=0.0, temperature=1.0,
        report_to=[], save_strategy="no", bf16=False, use_cpu=True, max_length=128, gradient_checkpointing=False, logging_steps=10,
    )  # fmt: skip
    weights = [p.clone() for p in teacher.parameters()]
    student.train()
    GKDTrainer(
        model=student, teacher_model=teacher, args=options, train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=pair.tokenizer,
    ).train()  # fmt: skip
    student.eval()
    assert distance() < 0.7 * before
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), weights, strict=True))
