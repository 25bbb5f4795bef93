"""Batches that fit: noise and figures do not depend on them, and where memory runs out, half as many go on."""

from __future__ import annotations

import warnings

import pytest
import torch
from builders import tiny_llama, tokenizer

from dera_merge import DeraWarning, ModelPair, compare
from dera_merge.calibrating.training import Trainer
from dera_merge.measuring.traces import Text, trace_of
from dera_merge.texts import batches as sizes
from dera_merge.texts.batches import Batches, is_out_of_memory
from dera_merge.texts.sampling import sample

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
PROMPTS = [list(range(3, 5 + n % 5)) for n in range(11)]


def too_small(model, rows: int, error: Exception = OUT):
    """The model, on a device that holds so many rows; keeps the rows that it was asked for."""
    asked = []

    def limit(module, args, kwargs):
        asked.append(len(kwargs["input_ids"]))
        if asked[-1] > rows:
            raise error

    model.register_forward_pre_hook(limit, with_kwargs=True)
    return asked


@pytest.mark.parametrize("size", [1, 3, None])
def test_texts_belong_to_the_prompt_whatever_the_batches(size):
    model = tiny_llama(0)
    one = sample(model, tokenizer(), PROMPTS, max_new_tokens=5, batches=Batches(size))
    assert one == sample(model, tokenizer(), PROMPTS, max_new_tokens=5, batches=Batches(4))


def test_where_memory_runs_out_sampling_goes_on_with_half_says_so_once_and_texts_are_the_same():
    expected = sample(tiny_llama(0), tokenizer(), PROMPTS, max_new_tokens=5)
    model = tiny_llama(0)
    asked, batches = too_small(model, 3), Batches()
    with pytest.warns(DeraWarning, match="memory ran out while sampling 11 texts") as told:
        assert sample(model, tokenizer(), PROMPTS, max_new_tokens=5, batches=batches) == expected
    assert len([w for w in told if issubclass(w.category, DeraWarning)]) == 1
    assert asked[:3] == [11, 5, 2]
    assert max(asked[2:]) == 2
    asked.clear()
    sample(model, tokenizer(), PROMPTS, max_new_tokens=5, batches=batches)  # what fits is remembered
    assert max(asked) == 2


def test_reading_halves_too_and_hidden_states_are_the_same():
    texts = [Text(n, [*ids, 7, 8], len(ids)) for n, ids in enumerate(PROMPTS)]
    expected = trace_of(tiny_llama(0), texts).hidden
    model = tiny_llama(0)
    too_small(model.model, 4, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    with pytest.warns(DeraWarning, match="memory ran out while reading"):
        found = trace_of(model, texts).hidden
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_text_that_does_not_fit_and_other_errors_are_raised():
    model = tiny_llama(0)
    too_small(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, tokenizer(), PROMPTS[:1], max_new_tokens=2)
    model = tiny_llama(0)
    too_small(model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        sample(model, tokenizer(), PROMPTS, max_new_tokens=2)
    assert is_out_of_memory(RuntimeError("[enforce fail] not enough memory: you tried to allocate 8 bytes"))


def test_on_an_accelerator_sizes_grow_with_free_memory_and_shrink_with_the_text(monkeypatch):
    model = tiny_llama(0)
    per_text = 40 * 2 * 2 * 16 * 4 + 32 * 64  # 40 tokens, keys and values, 2 layers, 2 heads of 8, float32; 64 logits
    free = {"bytes": 20 * per_text}
    monkeypatch.setattr(sizes, "free_memory", lambda device: free["bytes"])
    assert Batches().sampled(model, 40) == 10
    assert Batches().sampled(model, 40, models=2) == 5
    assert Batches(7).sampled(model, 40) == 7
    free["bytes"] = 0
    assert Batches().sampled(model, 40) == 1
    assert Batches().read(model, 100) == sizes.READ_TOKENS // 100
    free["bytes"] = 1 << 50
    assert (Batches().sampled(model, 40), Batches().read(model, 64)) == (sizes.MOST_SAMPLED, sizes.MOST_READ // 64)


def test_a_comparison_is_the_same_with_another_batch_size(llama, lora):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    prompts = [{"prompt": f"w{n} w{n + 1}"} for n in range(3, 8)]
    rows = [compare(pair, [0.5], prompts, max_new_tokens=4, extras=(), batch_size=size).results[0] for size in (1, None)]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-3, abs=1e-8)


def test_a_step_of_training_in_parts_has_the_gradient_of_the_whole():
    """Where memory does not hold a step, its gradient is summed over parts; what a part that broke off left is gone."""

    class Learner(Trainer):
        def __init__(self, most):
            self.weight, self.most, self.room = torch.nn.Parameter(torch.tensor(2.0)), most, Batches()
            texts = [Text(0, list(range(3 + n)), 1) for n in range(5)]
            self.teacher = type("", (), {"lessons": [type("", (), {"text": text})() for text in texts]})

        def kl(self, chosen):
            values = torch.cat([self.weight**2 * torch.arange(1.0, 3.0 + i) for i in chosen])
            if len(chosen) > self.most:
                values.sum().backward()  # breaks off after this
                raise torch.OutOfMemoryError("out of memory.")
            return values, torch.full((len(values),), 2.0)

    gradients = []
    for most in (5, 2):
        learner = Learner(most)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeraWarning)
            learner._backward([0, 1, 2, 3, 4], torch.optim.SGD([learner.weight], lr=1.0))
        gradients.append(float(learner.weight.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)
