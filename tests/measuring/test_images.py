"""compare on prompts that show images: given and sampled texts, against each class's own forward passes in float64."""

import copy

import numpy as np
import pytest
import torch
from builders import tokenizer
from wrapped import picture, saved_pair, tiny

from dera_merge import ModelPair, compare
from dera_merge.texts.noise import GumbelNoise
from dera_merge.texts.prompts import Prompt

pytestmark = pytest.mark.core

LAM, SEED, NEW = 0.6, 2, 4
CLASSES = ("Gemma3", "Llava", "Qwen2_5_VL", "Qwen3VL", "Mistral3")


@pytest.fixture(scope="module", params=CLASSES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pair(name, tmp_path_factory):
    pair = ModelPair.from_pretrained(*saved_pair(name, tmp_path_factory))
    pair.tokenizer = tokenizer()  # transformers gives some configs their own tokenizer class, whatever the files say
    return pair


@pytest.fixture(scope="module")
def trio(name):
    """Reference, aligned model, and the state dicts between them, of the plain class."""
    ref, aligned = tiny(name, 0), tiny(name, 1)
    merged, ours, theirs = copy.deepcopy(ref), ref.state_dict(), aligned.state_dict()
    for key, tensor in merged.state_dict().items():  # of tied tensors one is written twice
        if tensor.is_floating_point():
            tensor.copy_((1 - LAM) * ours[key].double() + LAM * theirs[key].double())
    return ref, aligned, merged


def shows(name, before, after):
    """A prompt with one picture, in tokens, as a processor would have made it, and all of a model's inputs."""
    inputs = picture(name, before, after)
    ids = inputs["input_ids"][0].tolist()
    shown = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return Prompt("a picture", ids, shown=shown), inputs


def longer(inputs, more):
    """The inputs with text behind them."""
    new = torch.tensor([more], dtype=torch.long)
    ids = torch.cat([inputs["input_ids"], new], 1)
    types = {key: torch.cat([value, 0 * new], 1) for key, value in inputs.items() if key.endswith("token_type_ids")}
    return {**inputs, **types, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def log_softmaxes(trio, inputs, completion):
    """Of exact DeRa and of the merge, (tokens, vocabulary) in float64, one whole forward of each plain model."""
    start = inputs["input_ids"].shape[1]
    read = longer(inputs, completion)
    ref, aligned, merged = (model(**read).logits[0, start - 1 : -1].double() for model in trio)
    return ((1 - LAM) * ref + LAM * aligned).log_softmax(-1), merged.log_softmax(-1)


def kl_of(trio, texts):
    """Mean over all tokens of texts, (inputs, completion) each."""
    kls = []
    for inputs, completion in texts:
        log_p, log_q = log_softmaxes(trio, inputs, completion)
        kls += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    return np.mean(kls)


def test_given_texts_are_scored_as_the_models_see_the_pictures(name, pair, trio):
    completions = [7, 8, 40, 9], [33, 5]
    asked = [shows(name, [5, 9, 62], [7, 8, 40]), shows(name, [12, 62], [9])]
    prompts = [Prompt(p.text, p.ids, c, shown=p.shown) for (p, _), c in zip(asked, completions, strict=True)]
    plain = Prompt("w5 w9 w12", [5, 9, 12], [33, 7])  # beside a prompt without one
    extras = ("floor", "layers") if name == "Qwen2_5_VL" else ()
    (result,) = compare(pair, [LAM], [*prompts, plain], dtype="float32", extras=extras).results
    texts = [(inputs, c) for (_, inputs), c in zip(asked, completions, strict=True)]
    unseen = {"input_ids": torch.tensor([plain.ids])}
    assert result["kl"] == pytest.approx(kl_of(trio, [*texts, (unseen, plain.completion)]), rel=1e-3)
    assert result["tokens"] == 8
    blind = [({**inputs, "pixel_values": 0 * inputs["pixel_values"]}, c) for inputs, c in texts]
    assert kl_of(trio, blind) != pytest.approx(kl_of(trio, texts), rel=0.01), "the pictures make no difference here"
    if extras:
        shares = [row["kl"] for row in result["layers"]["kinds"]]
        assert sum(shares) == pytest.approx(result["layers"]["kl_leading_order"])
        assert 0 < result["noise_floor"] < 0.1 * result["kl"]


@torch.no_grad()
def test_sampled_texts_are_exact_deras_own_under_the_same_noise(name, pair, trio):
    prompt, inputs = shows(name, [5, 9, 62], [7, 8, 40])
    report = compare(pair, [LAM], [prompt], dtype="float32", extras=(), samples=2, max_new_tokens=NEW, seed=SEED)
    expected = []
    for stream in (0, 1):
        noise, new = GumbelNoise([stream], SEED, pair.vocab_size), []
        while len(new) < NEW and 1 not in new:  # the end token
            now = longer(inputs, new)
            ref, aligned = (model(**now).logits[:, -1].double() for model in trio[:2])
            new.append(noise(now["input_ids"], ((1 - LAM) * ref + LAM * aligned).float()).argmax().item())
        expected.append(new)
    words = [[int(token.strip().removeprefix("w")) for token, _ in entry["scored"] if token.startswith("w")]
             for entry in report.texts]  # fmt: skip
    assert words == [[token for token in new if token > 2] for new in expected]
    assert report.results[0]["kl"] == pytest.approx(kl_of(trio, [(inputs, new) for new in expected]), rel=1e-3)
