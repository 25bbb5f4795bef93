"""calibrate where memory is short: the same gradients and the same path, in less; or one line before the work starts."""

import logging

import pytest
import torch
from builders import VOCAB

from dera_merge import DeraError, DeraForCausalLM, ModelPair, calibrate
from dera_merge.calibrating import calibrate as work
from dera_merge.calibrating import ways
from dera_merge.calibrating.layers import bend, bendable
from dera_merge.calibrating.lessons import Lesson
from dera_merge.calibrating.training import Teacher, Trainer
from dera_merge.calibrating.ways import Size, Way, recompute, way
from dera_merge.decoding.rows import in_rows
from dera_merge.measuring.traces import Text, trace_of

PROMPTS = [{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(3, 50)]
SMALL = {"texts": 24, "max_new_tokens": 6, "rank": 2, "passes": 1}


def trainer(pair, dtype=torch.float32, together=None):
    """A trainer over six texts, its layers bent at random, and its gradients of one step."""
    exact = pair.exact(dtype=dtype)
    student = exact.rows or in_rows(exact.ref, exact.ref, exact.aligned)
    exact.requires_grad_(False), student.requires_grad_(False)
    texts = [Text(n, torch.randint(3, VOCAB, (9 + n,), generator=torch.Generator().manual_seed(n)).tolist(), 2) for n in range(6)]
    states = [[trace_of(model, [text]).hidden for model in (exact.ref, exact.aligned)] for text in texts]
    lams = [0.2, 0.5, 0.9, 1.2, 1.6, 2.0]
    lessons = [Lesson(text, lam, *made) for text, lam, made in zip(texts, lams, states, strict=True)]
    heads = [] if dtype == torch.bfloat16 else None
    teacher = Teacher.of(exact, lessons, heads)
    torch.manual_seed(0)
    layers = bend(student, bendable(pair), 2, "cpu")
    for layer in layers.values():
        for parameter in (layer.gain, layer.up, layer.profile):
            parameter.data = 0.1 * torch.randn_like(parameter)
    if together:
        recompute(student)
    return exact, Trainer(student, layers, teacher, 6, 0.02, heads=heads, together=together)


def gradients(made, chosen=(0, 2, 3, 5)):
    _, learner = made
    with torch.enable_grad():
        kl, lams = learner.kl(chosen)
        (kl * lams).mean().backward()
    return kl, [parameter.grad for parameter in learner.parameters]


@pytest.fixture(params=["lora", "dense"])
def pair(request, llama, lora):
    base = llama(0)
    return ModelPair.from_pretrained(base, llama(1, near=0) if request.param == "dense" else lora(base))


@pytest.mark.core
def test_gradients_are_those_of_activations_that_are_kept(pair):
    kl, kept = gradients(trainer(pair))
    again_kl, same = gradients(trainer(pair, together=1000))
    assert torch.equal(kl, again_kl)
    assert all(torch.equal(one, other) for one, other in zip(kept, same, strict=True)), "bit for bit"
    few_kl, near = gradients(trainer(pair, together=5))
    torch.testing.assert_close(few_kl, kl, rtol=1e-4, atol=1e-6)
    for one, other in zip(kept, near, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_a_layer_keeps_what_comes_in_and_nothing_more(pair):
    def bytes_kept(made):
        found = {}

        def pack(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
            _ = made[1].kl([0, 1, 2, 3, 4, 5])
        return sum(found.values())

    assert bytes_kept(trainer(pair, together=4)) < bytes_kept(trainer(pair)) / 4


def test_only_gains_and_curves_have_gradients(pair, monkeypatch):
    loaded, found = [], []
    made, clip = DeraForCausalLM.from_pair, torch.nn.utils.clip_grad_norm_

    def load(*args, **kwargs):
        loaded.append(made(*args, **kwargs))
        return loaded[-1]

    def look(learned, limit):
        ours = {id(parameter) for parameter in learned}
        found.append([name for name, p in loaded[0].named_parameters() if id(p) not in ours and (p.requires_grad or p.grad is not None)])
        assert all(parameter.grad is not None for parameter in learned)
        return clip(learned, limit)

    monkeypatch.setattr(DeraForCausalLM, "from_pair", load)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL)
    assert found
    assert not any(found)


@pytest.mark.core
def test_a_limit_that_suffices_changes_no_bit_and_one_that_is_short_gives_the_same_path_within_rounding(pair, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dera_merge")
    free = calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL)
    assert "calibrating" not in caplog.text, "nothing was asked for, and all is as ever"
    monkeypatch.setattr(ways, "OTHER", 0)
    monkeypatch.setattr(Size, "takes", lambda self, dtype, recomputed=False, load_in=None: 2e9 if recomputed else 4e9)
    ample = calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL, max_memory="5GB")
    assert "in float32 with all activations kept: about 4.0 GB, --max-memory is 5.0 GB" in caplog.text
    caplog.clear()
    short = calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL, max_memory="3GB")
    assert "in float32 with activations checkpointed: about 2.0 GB, --max-memory is 3.0 GB (it would be 4.0 GB" in caplog.text
    for name, part in free.parts.items():
        assert all(torch.equal(value, getattr(ample.parts[name], key)) for key, value in vars(part).items())
        for key, value in vars(part).items():
            torch.testing.assert_close(getattr(short.parts[name], key), value, rtol=1e-2, atol=1e-4)


def test_what_does_not_fit_is_refused_in_one_line_before_any_model_is_loaded(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(DeraForCausalLM, "from_pair", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(DeraError, match=r"a path takes about 0\.\d GB, --max-memory is 0\.0 GB") as refused:
        calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL, max_memory="1KB", out=tmp_path / "deep" / "path.safetensors")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "deep").exists()
    with pytest.raises(DeraError, match="no size such as 8GB"):
        calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL, max_memory="much")


def test_of_auto_float32_comes_first_then_checkpoints_then_bfloat16_and_what_is_free_decides(monkeypatch):
    size = Size(
        linear=7_000_000_000, other=10**9, heads=5 * 10**8, ends=2_600_000, layers=32, hidden=4096, vocabulary=128_256,
        cache=65_536, learned=40_000_000, axes=0, sampled=8, text=80, step=128, looked=1200, kept=0, measured=0, one_base=True,
    )
    sizes = {one: size.takes(*one) for one in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for (dtype, recomputed), needed in sizes.items():
        monkeypatch.setattr(ways, "available", lambda device, needed=needed: needed + 1)
        assert way(size, "auto", "cuda") == Way(dtype, recomputed)
    monkeypatch.setattr(ways, "available", lambda device: 10e9)
    with pytest.raises(DeraError, match=r"10.0 GB are free on cuda; --load-in 4bit would take 9\.\d GB, --max-memory SIZE insists"):
        way(size, "auto", "cuda")
    monkeypatch.setattr(ways, "available", lambda device: None)
    assert way(size, "auto", "mps") == Way(torch.float32)


def test_a_base_in_4_bits_is_held_in_them_and_its_path_is_the_pairs(llama, lora, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = llama(0, hidden_size=64, intermediate_size=128)
    pair, loaded, bent = ModelPair.from_pretrained(base, lora(base)), [], work.bend

    def look(student, *args):
        loaded.append(student)
        return bent(student, *args)

    monkeypatch.setattr(work, "bend", look)
    path = calibrate(pair, [0.0, 2.0], PROMPTS, **SMALL, load_in="4bit")
    kinds = [type(module) for module in loaded[0].modules()]
    assert kinds.count(bitsandbytes.nn.Linear4bit) == len(bendable(pair))
    assert path.recipe["load_in"] == "4bit"
    assert pair.merged(0.5, path=path).dtype == torch.float32
    with pytest.raises(DeraError, match="for an adapter and its base"):
        calibrate(ModelPair.from_pretrained(base, llama(1, near=0, hidden_size=64, intermediate_size=128)), [0.0, 2.0], load_in="4bit")


@torch.no_grad()
def test_in_16_bits_a_head_that_an_adapter_changes_is_at_the_students_lambda_and_others_are_held_once(llama, lora):
    base = llama(0, tie_word_embeddings=False)
    pair = ModelPair.from_pretrained(base, lora(base, target_modules=["q_proj", "lm_head"]))
    exact, learner = trainer(pair, torch.bfloat16)
    hidden = torch.randn(3, exact.ref.config.hidden_size)
    lams = torch.tensor([0.0, 0.5, 1.0])
    with learner.strength.of(lams, 1):
        found = learner.head(hidden)
    ref, aligned = learner.teacher.ref(hidden), learner.teacher.aligned(hidden)
    assert not torch.allclose(ref, aligned, rtol=0.1)
    torch.testing.assert_close(found, ref + lams[:, None] * (aligned - ref), rtol=1e-4, atol=1e-4)
    plain = trainer(ModelPair.from_pretrained(base, lora(base, target_modules=["q_proj"])), torch.bfloat16)
    heads = []
    teacher = Teacher.of(plain[0], plain[1].teacher.lessons, heads)
    Trainer(plain[1].student, {}, teacher, 6, 0.02, heads=heads)
    assert len(heads) == 1
