"""Exact decoding, against a plain two-model loop written here."""

import threading

import pytest
import torch
from builders import LAMS, tiny_llama, tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, TextIteratorStreamer, pipeline

from dera_merge import DeraConfig, DeraError, DeraForCausalLM, ModelPair

PROMPTS = [[5, 9, 12, 33], [8, 41], [17, 3, 60, 22, 30, 7, 44]]
NEW = 12


@pytest.fixture(scope="module")
def models():
    return tiny_llama(0), tiny_llama(1)


@pytest.fixture
def exact(models):
    return DeraForCausalLM(*models, lam=0.5)


@torch.no_grad()
def two_model_loop(models, prompt, lam, steps=NEW):
    """Greedy DeRa: no cache, no batch, mixed in float64."""
    ids = list(prompt)
    for _ in range(steps):
        ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in models)
        ids.append(int((ref + lam * (aligned - ref)).argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(output, width):
    rows = []
    for row in output[:, width:].tolist():
        rows.append(row[: row.index(1) + 1] if 1 in row else row)
    return rows


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_plain_loop_alone_and_in_a_left_padded_batch(models, exact, lam, use_cache):
    expected = [two_model_loop(models, prompt, lam) for prompt in PROMPTS]
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache, "lam": lam}
    inputs = left_padded(PROMPTS)
    assert new_tokens(exact.generate(**inputs, **options), inputs["input_ids"].shape[1]) == expected
    single = exact.generate(torch.tensor([PROMPTS[0]]), **options)
    assert new_tokens(single, len(PROMPTS[0])) == expected[:1]


def test_the_loop_tells_lambdas_apart(models):
    texts = {tuple(two_model_loop(models, PROMPTS[0], lam)) for lam in LAMS}
    assert len(texts) > 3


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lambda_0_and_1_are_the_single_models(models, exact, lam):
    inputs = left_padded(PROMPTS)
    single = models[int(lam)].generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(exact.generate(**inputs, max_new_tokens=NEW, do_sample=False, lam=lam), single)


def test_each_sequence_has_its_own_lambda(models, exact):
    inputs = left_padded(PROMPTS)
    output = exact.generate(**inputs, max_new_tokens=NEW, do_sample=False, lam=[0.0, 2.0, 0.3])
    expected = [two_model_loop(models, prompt, lam) for prompt, lam in zip(PROMPTS, [0.0, 2.0, 0.3], strict=True)]
    assert new_tokens(output, inputs["input_ids"].shape[1]) == expected


@torch.no_grad()
def beam_search(models, prompt, lam, beams, steps):
    """Plain beam search of fixed length (the end token is not special), scores in float64."""
    alive = [(0.0, list(prompt))]
    for _ in range(steps):
        grown = []
        for score, ids in alive:
            ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in models)
            log_p = torch.log_softmax(ref + lam * (aligned - ref), -1)
            log_p[1] = -float("inf")
            grown += [(score + log_p[t].item(), [*ids, t]) for t in log_p.topk(beams).indices.tolist()]
        alive = sorted(grown, reverse=True)[:beams]
    return alive[0][1][len(prompt) :]


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_beams_equal_a_plain_beam_search(models, exact, lam):
    inputs = left_padded(PROMPTS[:2])
    output = exact.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False, lam=lam, suppress_tokens=[1])
    expected = [beam_search(models, prompt, lam, 3, 5) for prompt in PROMPTS[:2]]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected


def test_a_draft_model_does_not_change_the_output(models, exact):
    prompt = torch.tensor([PROMPTS[2]])
    for lam in (0.3, 2.0):
        drafted = exact.generate(prompt, max_new_tokens=NEW, do_sample=False, lam=lam, assistant_model=models[1])
        assert new_tokens(drafted, len(PROMPTS[2])) == [two_model_loop(models, PROMPTS[2], lam)]


def chi_square(samples, probabilities):
    counts = torch.bincount(samples, minlength=len(probabilities)).double()
    return ((counts - len(samples) * probabilities) ** 2 / (len(samples) * probabilities)).sum().item()


def test_sampling_follows_the_exact_distribution(models, exact):
    """Chi-square on 20 000 first tokens; the same test refuses samples of a merged probability, a likely mistake."""
    with torch.no_grad():
        ref, aligned = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() for model in models)
    truth = torch.softmax(0.7 * ref + 0.3 * aligned, -1)
    wrong = 0.7 * torch.softmax(ref, -1) + 0.3 * torch.softmax(aligned, -1)
    torch.manual_seed(0)
    prompts = torch.tensor([PROMPTS[0]])
    samples = exact.generate(
        prompts, max_new_tokens=1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, lam=0.3, num_return_sequences=20_000
    )[:, -1]
    limit = 121.1  # the 99.999 % quantile with 63 degrees of freedom
    assert chi_square(samples, truth) < limit
    assert chi_square(samples, wrong) > limit


def test_warpers_see_the_mixed_logits(exact):
    torch.manual_seed(0)
    output = exact.generate(torch.tensor([PROMPTS[0]] * 50), max_new_tokens=1, do_sample=True, top_k=1, lam=0.3)
    greedy = exact.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=1, do_sample=False, lam=0.3)
    assert (output[:, -1] == greedy[0, -1]).all()


def test_logits_are_mixed_in_float32_also_in_bfloat16(models):
    halves = [tiny_llama(seed).to(torch.bfloat16) for seed in (0, 1)]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = DeraForCausalLM(*halves, lam=0.3)(ids).logits
        ref, aligned = (model(ids).logits.double() for model in halves)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 0.7 * ref + 0.3 * aligned, rtol=0, atol=1e-5)


def test_a_token_that_both_models_mask_stays_masked_at_every_lambda(exact):
    from dera_merge.exact import mix

    ref, aligned = torch.tensor([[[1.0, -torch.inf]]]), torch.tensor([[[3.0, -torch.inf]]])
    for lam in LAMS:
        assert mix(ref, aligned, torch.tensor([lam])).tolist() == [[[pytest.approx(1 + 2 * lam), -torch.inf]]]


def test_threads_do_not_see_each_others_lambda(models, exact):
    expected = {lam: two_model_loop(models, PROMPTS[2], lam) for lam in LAMS}
    wrong = []

    def decode(lam):
        for _ in range(3):
            output = exact.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=NEW, do_sample=False, lam=lam)
            if new_tokens(output, len(PROMPTS[2])) != [expected[lam]]:
                wrong.append(lam)

    threads = [threading.Thread(target=decode, args=(lam,)) for lam in LAMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert exact.lam == 0.5


def test_a_conversation_goes_on_with_another_lambda(models, exact):
    """Caches do not depend on λ: turning it in mid-conversation equals starting over with the text so far."""
    prompt = torch.tensor([PROMPTS[2]])
    first = exact.generate(prompt, max_new_tokens=4, do_sample=False, lam=0.0, return_dict_in_generate=True)
    second = exact.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, lam=2.0)
    assert second[0, len(first.sequences[0]) :].tolist() == two_model_loop(models, first.sequences[0].tolist(), 2.0, 4)


def test_streaming_gives_the_text_of_generate(exact):
    words = tokenizer()
    inputs = words("w5 w9 w12", return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "lam": 2.0}
    thread = threading.Thread(target=exact.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == words.decode(exact.generate(**options)[0, 3:]).split()


def test_stopping_criteria_and_return_sequences_work(exact):
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    torch.manual_seed(0)
    output = exact.generate(
        **left_padded(PROMPTS), do_sample=True, num_return_sequences=4, max_new_tokens=30, lam=[0.0, 1.0, 2.0],
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(10)]),
    )  # fmt: skip
    assert output.shape == (12, 10)


def test_pipelines_run_it_without_a_logged_error(models, caplog):
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_propagation()
    words = tokenizer()
    exact = DeraForCausalLM(*models, lam=0.3)
    answer = pipeline("text-generation", model=exact, tokenizer=words)("w5 w9", max_new_tokens=4, do_sample=False)
    logging.disable_propagation()
    logging.set_verbosity_error()
    assert answer[0]["generated_text"].startswith("w5 w9")
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


def test_auto_classes_know_the_mixture():
    assert AutoModelForCausalLM._model_mapping[DeraConfig] is DeraForCausalLM


def test_labels_give_the_mean_cross_entropy(exact):
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        output = exact(ids, labels=ids)
    log_p = torch.log_softmax(output.logits[0, :-1].double(), -1)
    assert output.loss.item() == pytest.approx(-log_p[range(6), PROMPTS[2][1:]].mean().item(), rel=1e-5)


REFUSALS = {
    "a foreign cache": lambda m: m.generate(torch.tensor([[5]]), past_key_values=DynamicCache(), max_new_tokens=2),
    "generate_batch": lambda m: m.generate_batch([[5, 6]]),
    "a paged cache": lambda m: m.generate(torch.tensor([[5, 6]]), cache_implementation="paged", max_new_tokens=2),
    "guidance": lambda m: m.generate(torch.tensor([[5]]), guidance_scale=2.0, max_new_tokens=2),
    "embeddings": lambda m: m.generate(inputs_embeds=torch.zeros(1, 2, 32), max_new_tokens=2),
    "an ensemble with the draft": lambda m: m.generate(
        torch.tensor([[5]]), assistant_model=tiny_llama(2), assistant_ensemble_weight=0.5, max_new_tokens=2
    ),
    "hidden states": lambda m: m(torch.tensor([[5]]), output_hidden_states=True),
    "saving": lambda m: m.save_pretrained("/nonexistent"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_would_not_be_exact_is_refused(exact, what):
    with pytest.raises(DeraError):
        REFUSALS[what](exact)


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), [0.1, 0.2, 0.3]])
def test_a_lambda_that_does_not_fit_is_a_value_error(exact, lam):
    with pytest.raises(ValueError, match="finite|shape"):
        exact.generate(torch.tensor([[5, 6]]), lam=lam, max_new_tokens=2)


def test_a_lora_pair_shares_its_base_weights(llama, lora):
    base = llama(0)
    exact = ModelPair.from_pretrained(base, lora(base)).exact(0.5)
    ref, aligned = (
        {p.data_ptr(): p.numel() for name, p in model.named_parameters() if "lora_" not in name}
        for model in (exact.ref, exact.aligned)
    )
    assert ref == aligned
    assert not any("lora_" in name for name, _ in exact.ref.named_parameters())


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_a_lora_pair_decodes_like_two_separate_models(llama, lora, lam):
    from peft import PeftModel

    base = llama(0, dtype=torch.float32)
    adapter = lora(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    exact = ModelPair.from_pretrained(base, adapter).exact(lam)
    for prompt in PROMPTS:
        output = exact.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, len(prompt)) == [two_model_loop((plain, tuned), prompt, lam)]
