"""Exact decoding, against a plain two-model loop written here: two models side by side, and a LoRA pair in one pass."""

import threading

import pytest
import torch
from builders import LAMS, VOCAB, in_threads, save_tokenizer, tiny_llama, tiny_mistral, tokenizer
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dera_merge import DeraConfig, DeraError, DeraForCausalLM, ModelPair, PlausibilityMask, Speculation
from dera_merge.decoding.caches import CACHE, RowsCache

pytestmark = pytest.mark.core

PROMPTS = [[5, 9, 12, 33], [8, 41], [17, 3, 60, 22, 30, 7, 44]]
NEW = 12


def lora_pair(llama, lora, **config):
    """A LoRA pair, and its two models as transformers and PEFT load them, independently."""
    base = llama(0, dtype=torch.float32, **config)
    adapter = lora(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return ModelPair.from_pretrained(base, adapter), (AutoModelForCausalLM.from_pretrained(base), tuned.eval())


@pytest.fixture(scope="module", params=["two models", "one pass"])
def setting(request, llama, lora):
    if request.param == "two models":
        models = tiny_llama(0), tiny_llama(1)
        return models, DeraForCausalLM(*models)
    pair, models = lora_pair(llama, lora)
    exact = pair.exact()
    assert exact.rows is not None
    return models, exact


@pytest.fixture
def models(setting):
    return setting[0]


@pytest.fixture
def exact(setting):
    setting[1].set_lam(0.5)
    return setting[1]


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


def test_logits_are_mixed_in_float32_also_in_bfloat16():
    halves = [tiny_llama(seed).to(torch.bfloat16) for seed in (0, 1)]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = DeraForCausalLM(*halves, lam=0.3)(ids).logits
        ref, aligned = (model(ids).logits.double() for model in halves)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 0.7 * ref + 0.3 * aligned, rtol=0, atol=1e-5)


def test_a_token_that_both_models_mask_stays_masked_at_every_lambda(exact):
    from dera_merge.decoding.mix import mix, shares_of

    ref, aligned = torch.tensor([[[1.0, -torch.inf]]]), torch.tensor([[[3.0, -torch.inf]]])
    for lam in LAMS:
        assert mix([ref, aligned], shares_of(torch.tensor([lam]))).tolist() == [[[pytest.approx(1 + 2 * lam), -torch.inf]]]


def test_threads_do_not_see_each_others_lambda(models, exact):
    expected = {lam: two_model_loop(models, PROMPTS[2], lam) for lam in LAMS}
    wrong = []

    def decode(lam):
        for _ in range(3):
            output = exact.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=NEW, do_sample=False, lam=lam)
            if new_tokens(output, len(PROMPTS[2])) != [expected[lam]]:
                wrong.append(lam)

    in_threads(decode, LAMS)
    assert wrong == []
    assert exact.lam == 0.5


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_conversation_goes_on_with_another_lambda(models, exact, name):
    """Caches do not depend on λ: turning it in mid-conversation equals starting over with the text so far.

    Users may call a cache by its newer or its older name, whichever the installed transformers has.
    """
    prompt = torch.tensor([PROMPTS[2]])
    first = exact.generate(prompt, max_new_tokens=4, do_sample=False, lam=0.0, return_dict_in_generate=True)
    cache = {name: first.past_key_values}
    second = exact.generate(first.sequences, **cache, max_new_tokens=4, do_sample=False, lam=2.0)
    assert second[0, len(first.sequences[0]) :].tolist() == two_model_loop(models, first.sequences[0].tolist(), 2.0, 4)


def test_only_what_is_new_of_a_conversation_may_be_passed(models, exact):
    """transformers takes the new tokens alone when the mask covers all."""
    first = exact.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=4, do_sample=False, lam=0.0, return_dict_in_generate=True)
    known = first.past_key_values.get_seq_length()
    options = {"max_new_tokens": 4, "do_sample": False, "lam": 2.0, "past_key_values": first.past_key_values}
    mask = torch.ones_like(first.sequences)
    with pytest.raises(DeraError, match="whole conversation"):
        exact.generate(first.sequences[:, known:], attention_mask=mask, assistant_model=models[0], **options)
    second = exact.generate(first.sequences[:, known:], attention_mask=mask, **options)
    start = first.sequences.shape[1] - known
    assert second[0, start:].tolist() == two_model_loop(models, first.sequences[0].tolist(), 2.0, 4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_forward_pass_takes_its_own_cache_by_either_name(models, exact, name):
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        first = exact(ids[:, :-1], use_cache=True, lam=0.7)
        step = exact(ids[:, -1:], **{name: first.past_key_values}, use_cache=True, lam=0.7)
        ref, aligned = (model(ids).logits[:, -1].double() for model in models)
    torch.testing.assert_close(step.logits[:, -1].double(), 0.3 * ref + 0.7 * aligned, rtol=1e-4, atol=1e-4)


def test_two_caches_in_one_call_are_refused(exact):
    cache = exact(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    for call in (exact, exact.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(torch.tensor([[5, 6, 7]]), cache=cache, past_key_values=cache)


def test_no_model_is_called_by_a_name_that_its_library_calls_deprecated(exact, caplog, recwarn):
    """A mixture, its two models, a draft and a dial make transformers say of old names only what a plain model does."""
    from transformers.utils import logging

    how, ids = {"max_new_tokens": NEW, "do_sample": False}, torch.tensor([PROMPTS[2]])

    def said(work):
        logging.warning_once.cache_clear()  # what is said once in a process may have been said by another test
        recwarn.clear()
        caplog.clear()
        work()
        texts = [str(one.message) for one in recwarn] + [record.getMessage() for record in caplog.records]
        return {text for text in texts if "deprecated" in text}

    def plain():
        tiny_llama(0).generate(ids, num_beams=2, **how)
        tiny_llama(0).generate(ids, assistant_model=tiny_llama(2), **how)

    def ours():
        exact.generate(ids, num_beams=2, **how)
        exact.generate(ids, assistant_model=tiny_llama(2), speculation=Speculation(), **how)
        exact.generate(ids, assistant_model=tiny_llama(2), **how)
        if exact.rows is not None:
            exact.dial().generate(ids, **how)

    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        known = said(plain)
        assert said(ours) - known == set()
    finally:
        logging.disable_propagation()
        logging.set_verbosity_error()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_may_be_read_in_chunks(models, exact, size):
    output = exact.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=NEW, do_sample=False, lam=2.0, prefill_chunk_size=size)
    assert new_tokens(output, len(PROMPTS[2])) == [two_model_loop(models, PROMPTS[2], 2.0)]
    inputs = left_padded(PROMPTS[::2])
    output = exact.generate(**inputs, max_new_tokens=NEW, do_sample=False, lam=2.0, prefill_chunk_size=size)
    assert new_tokens(output, 7) == [two_model_loop(models, prompt, 2.0) for prompt in PROMPTS[::2]]


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


def test_pipelines_run_it_without_a_logged_error(exact, caplog):
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_propagation()
    run = pipeline("text-generation", model=exact, tokenizer=tokenizer())
    answer = run("w5 w9", max_new_tokens=4, do_sample=False)
    logging.disable_propagation()
    logging.set_verbosity_error()
    assert answer[0]["generated_text"].startswith("w5 w9")
    said = [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "WARNING")]
    # transformers 5.19's pipelines warn of arguments that they pass themselves, whatever the model.
    assert [text for text in said if "`generation_config`" not in text and "`max_new_tokens`" not in text] == []


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
    "guidance of a draft": lambda m: m.generate(
        torch.tensor([[5, 6]]), guidance_scale=2.0, assistant_model=tiny_llama(2), max_new_tokens=2
    ),
    "embeddings": lambda m: m.generate(inputs_embeds=torch.zeros(1, 2, 32), max_new_tokens=2),
    "an ensemble with the draft": lambda m: m.generate(
        torch.tensor([[5]]), assistant_model=tiny_llama(2), assistant_ensemble_weight=0.5, max_new_tokens=2
    ),
    "a draft with another vocabulary": lambda m: m.generate(
        torch.tensor([[5]]), assistant_model=tiny_llama(2, vocab_size=80), speculation=Speculation(), max_new_tokens=2
    ),
    "a mask that would see another token": lambda m: m.generate(
        torch.tensor([[5]]), logits_processor=LogitsProcessorList([PlausibilityMask(0.5)]), logits_to_keep=0, max_new_tokens=2
    ),
    "speculation without a draft": lambda m: m.generate(torch.tensor([[5]]), speculation=Speculation(), max_new_tokens=2),
    "hidden states": lambda m: m(torch.tensor([[5]]), output_hidden_states=True),
    "saving what has no name": lambda m: DeraForCausalLM(m.ref, m.aligned).save_pretrained("/nonexistent"),
    "a cache of rows for two models": lambda m: DeraForCausalLM(m.ref, m.aligned)(
        torch.tensor([[5]]), past_key_values=RowsCache(DynamicCache(config=m.ref.config), 2)
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_would_not_be_exact_is_refused(exact, what):
    with pytest.raises(DeraError):
        REFUSALS[what](exact)


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, [[9, 41, 6]]])
def test_guidance_is_of_the_mixture_at_the_calls_lambda(models, exact, negative):
    """h = u + s·(h_λ - u), both log-softmax, u after the negative prompt, or the last token alone; λ per sequence too."""
    options = {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 1.7}
    if negative:
        options["negative_prompt_ids"] = torch.tensor(negative)
    prompt = PROMPTS[0]

    def last(ids, lam):
        ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in models)
        return torch.log_softmax(ref + lam * (aligned - ref), -1)

    for lam in (0.0, 0.4, 2.0):
        ids, other = list(prompt), list(negative[0] if negative else prompt[-1:])
        for _ in range(6):
            h, u = last(ids, lam), last(other, lam)
            ids.append(int((u + 1.7 * (h - u)).argmax()))
            other.append(ids[-1])
            if ids[-1] == 1:
                break
        assert exact.generate(torch.tensor([prompt]), lam=lam, **options)[0].tolist() == ids
    if not negative:
        rows = exact.generate(torch.tensor([prompt] * 2), lam=[0.4, 2.0], **options)
        for row, lam in zip(rows, (0.4, 2.0), strict=True):
            alone = exact.generate(torch.tensor([prompt]), lam=lam, **options)[0]
            assert row[: len(alone)].tolist() == alone.tolist()


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


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("form", ["two models", "one pass"])
def test_every_kind_of_cache_gives_the_plain_loop(tmp_path, llama, lora, implementation, window, form):
    """Caches that grow, caches of fixed size, and windows that slide past the prompt."""
    made = [tiny_mistral(seed, window) for seed in (0, 1)]
    for seed, model in enumerate(made):
        model.save_pretrained(tmp_path / str(seed))
        save_tokenizer(tmp_path / str(seed))
    aligned = tmp_path / "1" if form == "two models" else lora(tmp_path / "0")
    if form == "one pass":
        made[1] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "0"), aligned).eval()
    exact = ModelPair.from_pretrained(tmp_path / "0", aligned).exact()
    assert (exact.rows is not None) == (form == "one pass")
    inputs = left_padded(PROMPTS)
    for lam in (0.3, 2.0):
        expected = [two_model_loop(made, prompt, lam) for prompt in PROMPTS]
        output = exact.generate(**inputs, max_new_tokens=NEW, do_sample=False, cache_implementation=implementation, lam=lam)
        assert new_tokens(output, inputs["input_ids"].shape[1]) == expected
        for prompt, text in zip(PROMPTS, expected, strict=True):  # without padding, masks are made another way
            alone = exact.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, cache_implementation=implementation, lam=lam
            )
            assert new_tokens(alone, len(prompt)) == [text]
        if implementation == "dynamic":
            beams = exact.generate(
                **inputs, max_new_tokens=5, num_beams=3, do_sample=False, lam=lam, suppress_tokens=[1]
            )
            searched = [beam_search(made, prompt, lam, 3, 5) for prompt in PROMPTS]
            assert beams[:, inputs["input_ids"].shape[1] :].tolist() == searched


def test_bfloat16_flips_only_tokens_whose_lead_is_within_its_noise(llama, lora):
    """Greedy texts in bfloat16, judged by float32 models that transformers and PEFT loaded."""
    pair, models = lora_pair(llama, lora)
    exact = pair.exact(dtype=torch.bfloat16)
    flips = checked = 0
    for lam in LAMS:
        for prompt in PROMPTS:
            ids = exact.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, lam=lam)
            with torch.no_grad():
                here = exact(ids, lam=lam).logits[0, len(prompt) - 1 : -1].double()
                ref, aligned = (model(ids).logits[0, len(prompt) - 1 : -1].double() for model in models)
            plain = ref + lam * (aligned - ref)
            noise = (here - plain).abs().max().item()
            lead = plain.topk(2).values.diff().abs().squeeze(-1)
            differs = plain.argmax(-1) != ids[0, len(prompt) :]
            flips += int(differs.sum())
            checked += len(differs)
            assert not (differs & (lead > 2 * noise)).any()
    assert checked > 100
    assert flips / checked < 0.1


def test_prompt_lookup_drafts_are_verified(models, exact):
    prompt = PROMPTS[2] * 2
    output = exact.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, lam=2.0, prompt_lookup_num_tokens=3)
    assert new_tokens(output, len(prompt)) == [two_model_loop(models, prompt, 2.0)]


def test_a_plausibility_mask_keeps_only_what_the_aligned_model_would_say(models, exact):
    """Against a loop with the mask written out; without the mask the text is another one."""
    alpha, lam = 0.3, 5.0
    ids = list(PROMPTS[2])
    with torch.no_grad():
        for _ in range(NEW):
            ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in models)
            likely = aligned.softmax(-1)
            ids.append(int((ref + lam * (aligned - ref)).masked_fill(likely < alpha * likely.max(), -torch.inf).argmax()))
            if ids[-1] == 1:
                break
    options = {"max_new_tokens": NEW, "do_sample": False, "lam": lam}
    mask = LogitsProcessorList([PlausibilityMask(alpha)])
    prompt = torch.tensor([PROMPTS[2]])
    assert exact.generate(prompt, logits_processor=mask, **options)[0].tolist() == ids
    twice = LogitsProcessorList([PlausibilityMask(alpha), PlausibilityMask(0.001)])  # both hold
    assert exact.generate(prompt, logits_processor=twice, **options)[0].tolist() == ids
    drafted = exact.generate(prompt, logits_processor=mask, assistant_model=models[0], **options)
    assert drafted[0].tolist() == ids
    assert exact.generate(prompt, **options)[0].tolist() != ids


def test_a_plausibility_mask_needs_a_model_that_shows_it_the_aligned_logits():
    with pytest.raises(RuntimeError, match="DeraForCausalLM"):
        tiny_llama(0).generate(torch.tensor([[5]]), logits_processor=LogitsProcessorList([PlausibilityMask(0.1)]))
    for alpha in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="α"):
            PlausibilityMask(alpha)


@pytest.mark.parametrize("kind", ["dense", "lora", "both adapters"])
def test_a_saved_mixture_is_loaded_by_name(llama, lora, tmp_path, kind):
    """Also after the directories moved together, and through the Auto class."""
    import shutil

    for name, source in (("ref", llama(0, dtype=torch.float32)), ("other", llama(1, dtype=torch.float32))):
        shutil.copytree(source, tmp_path / "here" / name)
    for name, seed in (("lora", 7), ("lora2", 8)):
        shutil.copytree(lora(llama(0, dtype=torch.float32), seed), tmp_path / "here" / name)
    here = tmp_path / "here"
    names = {"dense": ("ref", "other"), "lora": ("ref", "lora"), "both adapters": ("lora", "lora2")}[kind]
    base = here / "ref" if kind == "both adapters" else None
    exact = ModelPair.from_pretrained(here / names[0], here / names[1], base=base).exact(0.3)
    exact.save_pretrained(here / "mixture")
    assert sorted(file.name for file in (here / "mixture").iterdir()) == ["config.json", "generation_config.json"]
    assert str(tmp_path) not in (here / "mixture" / "config.json").read_text()
    with pytest.raises(DeraError, match="local directory"):
        exact.save_pretrained(here / "mixture", push_to_hub=True)
    expected = exact(torch.tensor([PROMPTS[0]])).logits
    here.rename(tmp_path / "there")
    for loader in (AutoModelForCausalLM, DeraForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "there" / "mixture")
        assert loaded.lam == 0.3
        assert torch.equal(loaded(torch.tensor([PROMPTS[0]])).logits, expected)


@pytest.mark.parametrize("far_side", ["ref", "aligned"])
def test_what_each_model_reads_is_on_its_device_and_logits_come_home(far_side):
    """The second device here is the meta device; the model on it only notes where its inputs are."""
    far, near, arrived = tiny_llama(0).to("meta"), tiny_llama(1), []

    def forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        arrived.append((input_ids.device.type, attention_mask.device.type))
        return CausalLMOutputWithPast(logits=torch.empty(*input_ids.shape, VOCAB, device="meta"))

    far.forward = forward
    exact = DeraForCausalLM(*((far, near) if far_side == "ref" else (near, far)))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        if far_side == "ref":
            assert exact(ids, attention_mask=torch.ones_like(ids)).logits.device.type == "meta"
        else:  # nothing can be copied out of the meta device, so the copy itself is what fails
            with pytest.raises(NotImplementedError, match="meta"):
                exact(ids, attention_mask=torch.ones_like(ids))
    assert arrived == [("meta", "meta")]
    assert exact.device == (far if far_side == "ref" else near).device


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_quantised_pairs_are_mixed_as_transformers_quantises_them(llama, lora, load_in, kind):
    from dera_merge.texts.generate import quantised

    config = {"hidden_size": 64, "intermediate_size": 128}  # nf4 packs blocks of 64
    base = llama(0, dtype=torch.float32, **config)
    aligned = llama(1, dtype=torch.float32, **config) if kind == "dense" else lora(base)

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised(load_in), device_map={"": "cpu"})

    ref = load(base)
    other = load(aligned) if kind == "dense" else PeftModel.from_pretrained(load(base), aligned)
    exact = ModelPair.from_pretrained(base, aligned).exact(0.7, quantization_config=quantised(load_in))
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        plain = 0.3 * ref(ids).logits.double() + 0.7 * other(ids).logits.double()
        dense = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        # 8-bit layers quantise activations too, so that a rounding anywhere is amplified by the next layer
        assert (exact(ids).logits.double() - plain).abs().mean() < (1e-5 if load_in == "4bit" else 0.02)
        assert (ref(ids).logits - dense).abs().mean() > 0.03
    if kind == "lora":  # one quantised base, twice the rows
        assert exact.rows is not None
        weights = [m.weight.data_ptr() for m in exact.modules() if "bitsandbytes" in type(m).__module__]
        assert len(set(weights)) == 14


def test_a_quantised_checkpoint_is_read_as_it_is(llama, tmp_path):
    from dera_merge.texts.generate import quantised

    config = {"hidden_size": 64, "intermediate_size": 128}
    sides = []
    for seed in (0, 1):
        folder = llama(seed, dtype=torch.float32, **config)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised("4bit"), device_map={"": "cpu"})
        model.save_pretrained(tmp_path / str(seed))
        save_tokenizer(tmp_path / str(seed))
        sides.append(model)
    ids = torch.tensor([PROMPTS[0]])
    exact = ModelPair.from_pretrained(tmp_path / "0", tmp_path / "1").exact(0.3)
    with torch.no_grad():
        plain = 0.7 * sides[0](ids).logits.double() + 0.3 * sides[1](ids).logits.double()
        torch.testing.assert_close(exact(ids).logits.double(), plain, rtol=0, atol=1e-4)


@pytest.mark.skipif(CACHE != "cache", reason="refused with an older transformers")
@pytest.mark.parametrize("use_cache", [True, False])
def test_state_space_models_decode_as_the_plain_loop_and_as_themselves(use_cache):
    """Mamba keeps a state in the place of keys and values, and its argument has had another name."""
    from transformers import MambaConfig, MambaForCausalLM

    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
        made.append(MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, eos_token_id=1)).eval())
    exact = DeraForCausalLM(*made)
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
    ids = torch.tensor([PROMPTS[2]])
    assert new_tokens(exact.generate(ids, lam=0.4, **options), 7) == [two_model_loop(made, PROMPTS[2], 0.4, 5)]
    for lam in (0, 1):
        inputs = left_padded(PROMPTS)
        assert torch.equal(exact.generate(**inputs, lam=lam, **options), made[lam].generate(**inputs, **options))
