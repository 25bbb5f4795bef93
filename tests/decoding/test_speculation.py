"""The merged model drafts, the pair verifies: the output stays exact DeRa's, whatever drafts."""

import pytest
import torch
from builders import tiny_llama, tiny_mistral
from test_exact import NEW, PROMPTS, chi_square, left_padded, lora_pair, new_tokens, two_model_loop
from transformers import GenerationConfig, LogitsProcessorList

from dera_merge import DeraForCausalLM, ModelPair, PlausibilityMask, Speculation
from dera_merge.decoding.speculation import MergedDraft

pytestmark = pytest.mark.core


@pytest.fixture(scope="module", params=["two models", "one pass"])
def setting(request, llama, lora):
    """(the pair's models, exact, drafts by name)."""
    if request.param == "two models":
        sides = llama(0, dtype=torch.float32), llama(1, dtype=torch.float32, near=0)
        pair = ModelPair.from_pretrained(*sides)
        exact = pair.exact()
        models = exact.ref, exact.aligned
    else:
        pair, models = lora_pair(llama, lora)
        exact = pair.exact()
    drafts = {"merged": pair.merged, "bfloat16": lambda lam: pair.merged(lam, compute_dtype=torch.bfloat16),
              "another model": lambda lam: tiny_llama(5), "another shape": lambda lam: tiny_llama(6, num_hidden_layers=3),
              "other heads": lambda lam: tiny_llama(6, num_key_value_heads=4)}  # fmt: skip
    if exact.rows is not None:
        drafts["the dial"] = lambda lam: exact.dial()
    return models, exact, drafts


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_greedy_output_is_the_plain_loops_whatever_drafts(setting, lam):
    models, exact, drafts = setting
    for name, draft in drafts.items():
        for prompt in PROMPTS:
            speculation = Speculation(max_draft=5)
            output = exact.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, lam=lam, assistant_model=draft(lam),
                speculation=speculation,
            )  # fmt: skip
            assert new_tokens(output, len(prompt)) == [two_model_loop(models, prompt, lam)], name
            assert 0 <= speculation.accepted <= speculation.drafted <= 5 * speculation.verifications
            if name in ("merged", "the dial"):
                assert speculation.drafted > 0


def test_padding_on_the_left_does_not_reach_the_draft(setting):
    models, exact, drafts = setting
    inputs = {key: value[1:2] for key, value in left_padded(PROMPTS).items()}  # five tokens of padding
    output = exact.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, lam=0.3, assistant_model=drafts["merged"](0.3), speculation=Speculation()
    )
    assert new_tokens(output, 7) == [two_model_loop(models, PROMPTS[1], 0.3)]


def test_the_statistics_add_up(setting):
    """Tokens are the prompt's first one, the accepted ones, and one a verification."""
    _, exact, drafts = setting
    speculation = Speculation()
    output = exact.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=40, do_sample=False, lam=0.3, assistant_model=drafts["merged"](0.3),
        speculation=speculation, suppress_tokens=[1],
    )  # fmt: skip
    undrafted = output.shape[1] - len(PROMPTS[0]) - speculation.accepted - speculation.verifications
    assert 1 <= undrafted <= 2  # the prompt's own, and the last, for which a draft would come too late
    assert speculation.acceptance_rate == speculation.accepted / speculation.drafted
    assert speculation.tokens_per_verification == pytest.approx(1 + speculation.accepted / speculation.verifications)


def test_the_interpolated_cache_is_first_order_in_delta(llama, monkeypatch):
    """The draft's cache against the one that the merged model would have computed, for Δ and for Δ/2: a quarter is left."""
    left = []
    ids = torch.tensor([[*PROMPTS[2], *PROMPTS[0]]])
    base, far = tiny_llama(0), tiny_llama(1)
    for size in (0.02, 0.01):
        aligned, merged = tiny_llama(0), tiny_llama(0)
        with torch.no_grad():
            for p, q, r, s in zip(*(m.parameters() for m in (base, far, aligned, merged)), strict=True):
                r.copy_(p + size * (q - p))
                s.copy_(p + 0.4 * size * (q - p))
            exact = DeraForCausalLM(base, aligned)
            past = exact(ids, use_cache=True).past_key_values
            config = GenerationConfig(do_sample=False, max_length=99)
            draft = MergedDraft(merged, Speculation(), config, LogitsProcessorList(), past, None, torch.tensor([0.4]))
            draft._follow(ids.shape[1])
            truth = merged(ids, use_cache=True).past_key_values
        errors = [(a.keys - b.keys).norm() / b.keys.norm() for a, b in zip(draft.cache.layers, truth.layers, strict=True)]
        left.append(max(errors).item())
    assert left[1] < 0.35 * left[0]


def test_blocks_grow_with_acceptance_and_shrink_without(setting):
    _, exact, drafts = setting
    lengths = {}
    for name, draft in (("good", drafts["merged"](0.02)), ("bad", tiny_llama(9))):
        speculation = Speculation()
        exact.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=60, do_sample=False, lam=0.02, assistant_model=draft,
            speculation=speculation, suppress_tokens=[1],
        )  # fmt: skip
        lengths[name] = speculation.drafted / speculation.verifications
    assert lengths["good"] > 2 * lengths["bad"]


def excess(samples, probabilities):
    """How far chi-square is above its 99.999 % quantile, tokens that are expected less than five times taken together."""
    rare = probabilities * len(samples) < 5
    bins = torch.cat([probabilities[~rare], probabilities[rare].sum()[None]])
    places = torch.where(rare, len(bins) - 1, (~rare).cumsum(0) - 1)
    free = len(bins) - 1
    quantile = free * (1 - 2 / (9 * free) + 4.265 * (2 / (9 * free)) ** 0.5) ** 3  # Wilson and Hilferty, 1931
    return chi_square(places[samples], bins) - quantile


def test_sampling_with_a_draft_follows_the_exact_distribution(setting):
    """Chi-square over the second new token, the first that is drafted; the draft's own distribution fails it."""
    models, exact, _ = setting
    draft, lam, prompt, temperature = tiny_llama(0, initializer_range=0.2), 0.3, PROMPTS[0], 0.7

    def two_tokens(model):
        """The distribution of the second token: the sum over all first ones."""
        with torch.no_grad():
            first = model(torch.tensor([prompt]))[0].softmax(-1)
            second = model(torch.tensor([[*prompt, token] for token in range(64)])).softmax(-1)
        return first @ second

    def mixture(ids):
        ref, aligned = (m(ids).logits[:, -1].double() for m in models)
        return (ref + lam * (aligned - ref)) / temperature

    truth = two_tokens(mixture)
    wrong = two_tokens(lambda ids: draft(ids).logits[:, -1].double() / temperature)
    torch.manual_seed(0)
    samples = [
        exact.generate(
            torch.tensor([prompt]), max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, lam=lam,
            assistant_model=draft, speculation=Speculation(max_draft=2), eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) + 1]
        for _ in range(400)
    ]  # fmt: skip
    assert excess(torch.stack(samples), truth) < 0
    assert excess(torch.stack(samples), wrong) > 0


def test_the_plausibility_mask_goes_with_a_draft(setting):
    _, exact, drafts = setting
    options = {"max_new_tokens": NEW, "do_sample": False, "lam": 5.0}
    mask = LogitsProcessorList([PlausibilityMask(0.3)])
    prompt = torch.tensor([PROMPTS[2]])
    drafted = exact.generate(
        prompt, logits_processor=mask, assistant_model=drafts["merged"](5.0), speculation=Speculation(), **options
    )
    assert torch.equal(drafted, exact.generate(prompt, logits_processor=mask, **options))


def test_a_conversation_goes_on_with_a_draft(setting):
    """The pair's cache of the first turn fills the draft's too."""
    models, exact, drafts = setting
    first = exact.generate(
        torch.tensor([PROMPTS[2]]), max_new_tokens=4, do_sample=False, lam=0.3, return_dict_in_generate=True
    )
    speculation = Speculation()
    second = exact.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False, lam=2.0,
        assistant_model=drafts["merged"](2.0), speculation=speculation,
    )  # fmt: skip
    start = len(first.sequences[0])
    assert second[0, start:].tolist() == two_model_loop(models, first.sequences[0].tolist(), 2.0, 6)


def test_sliding_windows_are_drafted_for_too():
    made = [tiny_mistral(seed, 6) for seed in (0, 1, 2)]
    exact = DeraForCausalLM(*made[:2])
    for prompt in PROMPTS:
        for draft in (made[0], made[2]):
            output = exact.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, lam=0.3, assistant_model=draft, speculation=Speculation()
            )
            assert new_tokens(output, len(prompt)) == [two_model_loop(made[:2], prompt, 0.3, 20)]
