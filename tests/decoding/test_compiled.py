"""A compiled step: the graph is whole, one serves all steps, λ, texts and calls, and tokens are those of plain decoding."""

from types import SimpleNamespace

import pytest
import torch
from builders import in_threads, tiny_llama, tiny_mistral, tokenizer
from torch._dynamo.utils import counters
from transformers import CompileConfig, LogitsProcessorList

from dera_merge import DeraForCausalLM, ModelPair, PlausibilityMask, Speculation
from dera_merge.decoding.caches import CACHE
from dera_merge.texts.batches import Batches
from dera_merge.texts.sampling import sample

PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 5, 9, 12], [17, 3, 60, 22, 30, 7]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}
PLAIN = {"input_ids": torch.tensor([[8, 41, 5, 9], [33, 12, 6, 7]])}
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FORMS = ["two passes", "rows", "dial"]
ROWS_ELSE_SLOW = ["rows", *(pytest.param(form, marks=pytest.mark.slow) for form in ("two passes", "dial"))]


@pytest.fixture
def settings():
    """Arguments of `generate` that compile on a CPU too, and fail where the graph is not whole."""
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    yield {"cache_implementation": "static", "compile_config": config}
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def exact(llama, lora):
    base = llama(0, dtype=torch.float32, num_hidden_layers=1)
    return ModelPair.from_pretrained(base, lora(base)).exact(0.5)


@pytest.fixture
def model(request, exact):
    if request.param == "two passes":
        return DeraForCausalLM(*(tiny_llama(seed, num_hidden_layers=1) for seed in (0, 1)), 0.5)
    return exact if request.param == "rows" else exact.dial()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("model", FORMS, indirect=True)
def test_one_graph_serves_all_steps_and_calls(model, settings):
    for inputs, more in [
        (PADDED, {}), (PADDED, {"lam": [0.0, 2.0]}), (PLAIN, {"lam": 1.5}), (PLAIN, {"max_new_tokens": 7}),
        (PADDED, {"lam": torch.tensor([5.0, 0.3], dtype=torch.float64), "do_sample": True, "top_k": 0}),
    ]:  # fmt: skip
        texts = []
        for kind in ({}, settings):
            torch.manual_seed(0)
            texts.append(model.generate(**inputs, **GREEDY | more, **kind))
        assert torch.equal(*texts)
        assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_several_aligned_models_too(llama, lora, settings):
    base = llama(0, dtype=torch.float32, num_hidden_layers=1)
    several = ModelPair.from_pretrained(base, [lora(base), lora(base, 8)]).exact()
    for model in (several, several.dial()):
        counters.clear()
        for lam in ([0.5, 0.25], [[0.0, 1.0], [2.0, -1.0]]):
            plain, compiled = (model.generate(**PADDED, **GREEDY, lam=lam, **kind) for kind in ({}, settings))
            assert torch.equal(plain, compiled)
            assert graphs() == 1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("windows", [(4, None), (None, 3), pytest.param((4, 4), marks=pytest.mark.slow)])
def test_each_model_has_the_masks_of_its_own_config(windows, settings, compiled):
    """Windows that slide past the prompt, of one model or of both."""
    exact = DeraForCausalLM(*(tiny_mistral(seed, window) for seed, window in enumerate(windows)))
    if not compiled:
        del settings["compile_config"]
    exact.generate(**PADDED, **GREEDY, **settings)
    once = graphs()
    assert once <= 3  # a window that fills up is another step
    for lam in (0.3, [0.0, 2.0]):
        plain = exact.generate(**PADDED, **GREEDY, lam=lam)
        assert torch.equal(plain, exact.generate(**PADDED, **GREEDY, lam=lam, **settings))
    assert graphs() == once


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["two passes", "rows"], indirect=True)
def test_whatever_else_generate_does(model, settings, compiled):
    """Beams, several samples, a mask that sees the aligned model, chunks of a prompt, a conversation that goes on."""
    how = {"compile_config": settings["compile_config"]} if compiled else {}
    for more in (
        {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 0}, {"prefill_chunk_size": 2},
        {"logits_processor": LogitsProcessorList([PlausibilityMask(0.3)]), "lam": 3.0},
    ):  # fmt: skip
        texts = []
        for kind in ({}, {"cache_implementation": "static", **how}):
            torch.manual_seed(0)
            texts.append(model.generate(**PADDED, **GREEDY | more, **kind))
        assert torch.equal(*texts)
    options = {"cache_implementation": "static", "max_cache_len": 40, "return_dict_in_generate": True}
    begun = model.generate(**PLAIN, **GREEDY, **options, **how)
    again = GREEDY | {"attention_mask": torch.ones_like(begun.sequences), "lam": 2.0}
    on = model.generate(begun.sequences, **again, **{CACHE: begun[CACHE]}, **how)
    assert torch.equal(on, model.generate(begun.sequences, **again))
    assert bool(graphs()) == compiled


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["two passes", "rows"], indirect=True)
def test_a_draft(model, exact, settings, compiled):
    if not compiled:
        del settings["compile_config"]
    one = {"input_ids": PADDED["input_ids"][1:]}
    counts = []
    for _ in range(3):
        drafting = Speculation()
        drafted = model.generate(**one, **GREEDY, assistant_model=exact.dial(), speculation=drafting, **settings)
        assert torch.equal(drafted, model.generate(**one, **GREEDY))
        assert drafting.drafted
        counts.append(graphs())
    assert counts[1] == counts[2] <= 4  # of blocks of one token, of the first one's length, and of any


@pytest.mark.parametrize("model", ROWS_ELSE_SLOW, indirect=True)
def test_sampling_batch_after_batch_compiles_once(model, settings):
    """Whatever their widths: the cache has room for the longest from the first on."""
    prompts = [list(range(3, 5 + number)) for number in range(6)]

    def texts(lam: float, **how) -> list[list[int]]:
        return sample(
            model, tokenizer(), prompts, max_new_tokens=5, lams=[lam] * len(prompts), batches=Batches(2), **how
        )

    for lam in (0.5, 2.0):
        assert texts(lam, **settings) == texts(lam)
        assert graphs() == 1


def test_threads_do_not_see_each_others_lambda(exact, settings):
    lams = [0.0, 0.5, 1.0, 2.0]
    expected = {lam: exact.generate(**PADDED, **GREEDY, lam=lam) for lam in lams}
    exact.generate(**PADDED, **GREEDY, **settings)
    found = {}
    in_threads(lambda lam: found.update({lam: exact.generate(**PADDED, **GREEDY, lam=lam, **settings)}), lams)
    assert all(torch.equal(found[lam], expected[lam]) for lam in lams)
    assert graphs() == 1


def test_a_model_that_transformers_would_not_compile_is_not_compiled(settings):
    exact = DeraForCausalLM(tiny_llama(0), tiny_llama(1))
    exact.aligned.hf_quantizer = SimpleNamespace(is_compileable=False)
    exact.generate(**PADDED, **GREEDY, **settings)
    assert graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", FORMS, indirect=True)
def test_with_the_compiler_that_a_gpu_gets(model, settings):
    settings["compile_config"].backend = "inductor"
    for lam in (0.5, [0.0, 2.0]):
        texts = [model.generate(**PADDED, **GREEDY, lam=lam, **kind) for kind in ({}, settings)]
        assert torch.equal(*texts)
    assert graphs() == 1
