"""Learned paths: what a file says is what every form of the merge does, and both ends stay exact."""

import json

import numpy as np
import pytest
import torch
from builders import VOCAB, random_path, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dera_merge import Curve, DeraError, ModelPair, calibrate, compare, demo
from dera_merge.calibrating import training
from dera_merge.calibrating.layers import RIDGE, SINKS, Evener, bend, bendable, learned, measure
from dera_merge.calibrating.lessons import Lesson, sampled_lessons
from dera_merge.decoding.rows import in_rows
from dera_merge.measuring.ledger import Ledger
from dera_merge.measuring.traces import Text
from dera_merge.merging.path import Part
from dera_merge.models.fingerprint import fingerprint

PROMPTS = [{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(3, 50)]


def theta(pair, path, lam, ref, aligned):
    """θ(λ) of every tensor in float64, from the formula."""
    found = {}
    for name, start in ref.items():
        start, end = start.double(), aligned[name].double()
        gain, curve = lam, 0.0
        if name in path.parts:
            part = path.parts[name]
            c, d = part.gain.double()
            gain = lam + lam * (1 - lam) * (c + d * lam)
            curve = sum(
                lam * (1 - lam) * (1 + a * (lam - 1) + b * (lam - 1) ** 2) * torch.outer(column, row)
                for column, row, (a, b) in zip(part.left.double().T, part.right.double(), part.profile.tolist(), strict=True)
            )
        found[name] = start + gain * (end - start) + curve
    return found


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from builders import save_tokenizer

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        folders.append(tmp_path_factory.mktemp("gpt2"))
        config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
        model = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folders[-1])
        save_tokenizer(folders[-1])
    return ModelPair.from_pretrained(*folders)


@pytest.fixture(params=["dense", "lora", "gpt2"])
def pair(request, llama, lora, gpt2):
    if request.param == "gpt2":
        return gpt2
    base = llama(0)
    return ModelPair.from_pretrained(base, llama(1, near=0) if request.param == "dense" else lora(base))


@pytest.mark.core
@pytest.mark.parametrize("lam", [0.3, 1.7])
def test_a_merge_along_a_path_is_the_formula(pair, lam, tmp_path):
    path = random_path(pair)
    ends = [weights(folder) for folder in pair.merge(tmp_path / "ends", [0.0, 1.0], dtype="float32")]
    (folder,) = pair.merge(tmp_path / "out", [lam], dtype="float32", path=path)
    expected = theta(pair, path, lam, *ends)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    live = pair.merged(0.5, path=path)
    live.set_lam(lam)
    for name, tensor in weights(folder).items():
        if name in live.state_dict():
            assert torch.equal(live.state_dict()[name], tensor)


def test_both_ends_of_any_path_are_the_lines_bit_for_bit(pair, tmp_path):
    path = random_path(pair, size=10.0)
    line = pair.merge(tmp_path / "line", [0.0, 1.0])
    bent = pair.merge(tmp_path / "bent", [0.0, 1.0], path=path)
    for one, other in zip(line, bent, strict=True):
        ours, theirs = weights(one), weights(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@given(st.floats(0.01, 0.99) | st.floats(1.01, 2.0), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_path_without_bends_is_the_straight_line(lam, rank):
    low_rank = (torch.randn(4, rank), torch.zeros(rank, 3), torch.randn(rank, 2)) if rank else ()
    bend = Curve((0, 2), "", {"w": Part(torch.zeros(2), *low_rank)}).at("w", lam)
    value = torch.zeros(4, 3)
    bend.add_to(value, 0)
    assert bend.gain == lam
    assert not value.any()


@pytest.mark.parametrize("lam", [0.4, 1.5])
def test_an_adapter_along_a_path_is_the_merge_along_it(llama, lora, lam, tmp_path):
    base = llama(0, dtype=torch.float32)
    pair = ModelPair.from_pretrained(base, lora(base, target_modules=["q_proj", "down_proj"]))
    path = random_path(pair)
    (folder,) = pair.merge(tmp_path / "adapter", [lam], format="adapter", path=path, dtype="float32")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, pair.merged(lam, path=path)(ids).logits, rtol=1e-4, atol=1e-4)
    recipe = json.loads((folder / "dera_merge.json").read_text())
    assert recipe["path"]["kind"] == "curve"


def test_a_path_file_comes_back_as_it_was(pair, tmp_path):
    path = random_path(pair)
    path.recipe = {"ref": "a", "note": "λ"}
    again = Curve.load(path.save(tmp_path / "p.safetensors"))
    assert (again.span, again.fingerprint, again.recipe, again.kind) == (path.span, path.fingerprint, path.recipe, "curve")
    for name, part in path.parts.items():
        for key, value in vars(part).items():
            assert torch.equal(getattr(again.parts[name], key), value)


def test_a_path_of_another_pair_or_another_range_is_refused(llama, lora, tmp_path):
    base = llama(0)
    path = random_path(ModelPair.from_pretrained(base, lora(base, seed=7)))
    other = ModelPair.from_pretrained(base, lora(base, seed=8))
    with pytest.raises(DeraError, match="another pair"):
        other.merge(tmp_path / "out", [0.5], path=path)
    same = ModelPair.from_pretrained(base, lora(base, seed=7))
    with pytest.raises(DeraError, match="from 0 to 2, not for 2.5"):
        same.merge(tmp_path / "out", [0.5, 2.5], path=path)
    with pytest.raises(DeraError, match="not for 3"):
        same.merged(0.5, path=path).set_lam(3.0)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_paths_are_refused_in_one_line(pair, tmp_path):
    good = random_path(pair).save(tmp_path / "good.safetensors")
    whole = good.read_bytes()
    cases = {"empty": b"", "text": b"hello", "cut": whole[:-4], "longer": whole + b"0"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    meta = {"format": "dera-merge path", "version": "2", "kind": "gains", "lambda": "[0, 2]", "fingerprint": "", "recipe": "{}"}
    gain = {"gain/w": torch.zeros(2)}
    factors = {"left/w": torch.zeros(4, 2), "right/w": torch.zeros(2, 3)}
    save_file(gain, tmp_path / "other", {"format": "pt"})
    save_file({"inner/gain/w": torch.zeros(2)}, tmp_path / "older", {**meta, "version": "1"})
    save_file(gain, tmp_path / "newer", {**meta, "version": "99"})
    save_file(gain, tmp_path / "span", {**meta, "lambda": "[0"})
    save_file(gain, tmp_path / "recipe", {key: value for key, value in meta.items() if key != "recipe"})
    save_file({"gain/w": torch.full((2,), torch.nan)}, tmp_path / "nan", meta)
    save_file({"gain/w": torch.zeros(3)}, tmp_path / "long", meta)
    save_file({**gain, "left/w": torch.zeros(2, 2)}, tmp_path / "half", meta)
    save_file({**gain, **factors}, tmp_path / "no_profile", meta)
    save_file({**gain, **factors, "profile/w": torch.zeros(3, 2)}, tmp_path / "long_profile", meta)
    save_file({**gain, **factors, "profile/w": torch.zeros(2, 3)}, tmp_path / "wide_profile", meta)
    save_file({**factors, "profile/w": torch.zeros(2, 2)}, tmp_path / "no_gain", meta)
    save_file({"sideways/w": torch.zeros(2)}, tmp_path / "kind", meta)
    save_file({"gain": torch.zeros(2)}, tmp_path / "nameless", meta)
    save_file({"gain/w": torch.zeros(2, dtype=torch.float64)}, tmp_path / "wide", meta)
    Curve.load(good)
    save_file({**gain, **factors, "profile/w": torch.zeros(2, 2)}, good, meta)
    Curve.load(good)
    for file in [tmp_path / "missing", *(path for path in tmp_path.iterdir() if path != good)]:
        with pytest.raises(DeraError) as caught:
            Curve.load(file)
        assert str(file.name) in str(caught.value), file
        assert "\n" not in str(caught.value)


def test_a_path_for_tensors_of_another_shape_is_refused(llama, lora, tmp_path):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    path = random_path(pair)
    name = next(iter(path.parts))
    path.parts[name] = Part(torch.zeros(2), torch.zeros(5, 1), torch.zeros(1, 7), torch.zeros(1, 2))
    with pytest.raises(DeraError, match="another shape"):
        pair.merge(tmp_path / "out", [0.5], path=path)


@pytest.mark.core
def test_calibration_never_ends_further_away_on_held_out_texts(pair):
    path = calibrate(pair, [0.0, 2.0], PROMPTS, texts=120, max_new_tokens=12, rank=4, passes=2, seed=1)
    line, best = path.recipe["objective"]["line"], path.recipe["objective"]["path"]
    assert best < line or (best == line and path.recipe["kept"] == "line")
    assert path.recipe["held_out"].keys() == {"inner", "outer"}
    assert path.kind == "curve"


@pytest.mark.core
@torch.no_grad()
def test_what_is_trained_is_what_is_merged(pair):
    """The student, whose rows have a λ each, and the merge along the path made of it are one model at every λ."""
    exact = pair.exact()
    student = exact.rows or in_rows(exact.ref, exact.ref, exact.aligned)
    layers = bend(student, bendable(pair), 3, "cpu")
    torch.manual_seed(0)
    for layer in layers.values():
        for parameter in (layer.gain, layer.up, layer.down, layer.profile):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    path = Curve((0.0, 2.0), fingerprint(pair), learned(pair, layers))
    lams = torch.tensor([0.3, 0.8, 1.2, 1.7])
    ids = torch.tensor([[5, 6, 7, 8, 9]] * 4)
    with student.dera_strength.of(lams, ids.shape[1]):
        rows = student(ids, position_ids=torch.arange(5).expand(4, 5)).logits
    for lam, row in zip(lams.tolist(), rows, strict=True):
        torch.testing.assert_close(row, pair.merged(lam, path=path)(ids[:1]).logits[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_is_kept_while_sampling_is_what_both_models_make_of_prompt_and_answer(pair):
    """From where prompts differ; of prompts that are held out, of the answer alone."""
    exact = pair.exact()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12], [5, 6, 13]]
    lessons = sampled_lessons(pair, exact, prompts, [0, 1, 2], [0.3, 0.7, 1.5], {1}, 6, lambda *_: None, Ledger(None, {}))
    assert [lesson.lam for lesson in sorted(lessons, key=lambda lesson: lesson.text.prompt)] == [0.3, 0.7, 1.5]
    for lesson in lessons:
        prompt, text = prompts[lesson.text.prompt], lesson.text
        assert text.ids[: len(prompt)] == prompt
        assert len(text.ids) > len(prompt)
        assert text.start == (len(prompt) if text.prompt == 1 else 2)
        for model, kept in ((exact.ref, lesson.ref), (exact.aligned, lesson.aligned)):
            states = model.base_model(torch.tensor([text.ids]), use_cache=False)[0][0]
            torch.testing.assert_close(kept, states[text.start - 1 : -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_curve_is_learned_where_inputs_are_less_uneven_and_in_units_of_what_the_difference_does(llama, lora):
    base = llama(0, dtype=torch.float32)
    pair = ModelPair.from_pretrained(base, lora(base, target_modules=["q_proj", "k_proj", "down_proj"], r=2))
    exact = pair.exact()
    layers = bend(exact.rows, bendable(pair), 2, "cpu")
    lessons = [
        Lesson(Text(n, torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(n)).tolist(), 4), lam, None, None)
        for n, lam in enumerate(np.linspace(0.1, 0.9, 40).tolist())
    ]
    measure(exact.rows, layers, lessons)
    ends = [pair.merged(lam).state_dict() for lam in (0.0, 1.0)]
    line = pair.merged(0.5)
    for module in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{module}"
        inputs = []
        hook = line.get_submodule(name).register_forward_hook(lambda _, args, y, inputs=inputs: inputs.append(args[0][0, SINKS :].double()))
        for lesson in lessons:
            line.set_lam(lesson.lam)
            line(torch.tensor([lesson.text.ids]))
        hook.remove()
        x, layer = torch.cat(inputs), layers[f"{name}.weight"]
        delta = (ends[1][f"{name}.weight"] - ends[0][f"{name}.weight"]).double()
        assert layer.scale == pytest.approx(float((x @ delta.T).square().mean().sqrt()), rel=1e-3)
        variances, axes = torch.linalg.eigh(x.T @ x / len(x))
        floor = RIDGE * variances.mean()
        variances = variances.clamp(min=floor)
        scale = variances**-0.25
        scale /= (scale**2 * variances).mean().sqrt()
        expected = (axes * scale) @ axes.T  # layers this narrow have no other directions
        found = layer.evener(torch.eye(len(expected))).double()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_of_wide_inputs_the_largest_directions_are_scaled_one_by_one_and_the_others_alike():
    torch.manual_seed(0)
    spread = torch.ones(200)
    spread[:3] = torch.tensor([100.0, 30.0, 10.0])
    rotation = torch.linalg.qr(torch.randn(200, 200))[0]
    sample = lambda: torch.randn(4000, 200) * spread @ rotation.T  # noqa: E731
    evener = Evener.of(sample())
    even = sample() @ evener(torch.eye(200)).T
    variances = (even @ rotation).square().mean(0)
    assert float(variances.mean()) == pytest.approx(1.0, rel=0.05)
    # Standard deviations 100, 30, 10 and 1 become their square roots.
    assert (variances[:3] / variances[3:].mean()).sqrt().tolist() == pytest.approx([10.0, 30**0.5, 10**0.5], rel=0.1)
    assert float(variances[3:].max()) < 1.5 * float(variances[3:].mean())


def test_a_path_is_nearer_than_the_line_on_texts_that_calibration_has_not_seen():
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    path = calibrate(pair, [1.0, 2.0], demo.prompts("validation"), texts=96, max_new_tokens=32)
    for result in compare(pair, [1.5, 2.0], demo.prompts(), path=path, dtype="float32", max_new_tokens=32, extras=(), seed=7).results:
        assert result["kl"] < result["line"]["kl"] / 1.3
        assert result["line"]["difference_ci"][1] < 0


def test_calibration_in_bfloat16_runs(llama, lora):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    assert calibrate(pair, [0.0, 1.0], PROMPTS, texts=20, max_new_tokens=4, rank=2, compute_dtype=torch.bfloat16).parts


def test_gains_alone_are_two_numbers_a_layer(pair):
    path = calibrate(pair, [0.0, 1.0], PROMPTS, kind="gains", texts=40, max_new_tokens=8)
    assert path.kind == "gains"
    assert {name for name in path.parts if name.endswith("weight")} == set(bendable(pair).values())
    assert all(part.left is None for part in path.parts.values())


def test_the_same_calibration_gives_the_same_path(llama, lora):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    one, other = (calibrate(pair, [0.0, 1.0], PROMPTS, texts=32, max_new_tokens=6, rank=2) for _ in range(2))
    for name, part in one.parts.items():
        assert torch.equal(part.left, other.parts[name].left)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([-1.0, 1.0],), "from 0 on"),
        (([0.0, 1.0], PROMPTS[:1]), "too few to hold one out"),
        (([1.0],), "nothing to learn"),
        (([0.0, 2.0], PROMPTS, "texts"), "too few"),
    ],
)
def test_a_calibration_that_cannot_work_says_why(llama, lora, arguments, message):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    options = {"texts": 4} if len(arguments) == 3 else {"texts": 20, "max_new_tokens": 2}
    with pytest.raises(DeraError, match=message):
        calibrate(pair, *arguments[:2], **options)


@pytest.mark.parametrize("prompts", [PROMPTS, None])
def test_an_interrupted_calibration_goes_on_to_the_same_path_and_typed_again_throws_nothing_away(
    llama, lora, prompts, tmp_path, monkeypatch
):
    """Stopped in every stage, again and again: each run gets a little further, and the bits are those of one run."""
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    how = {"texts": 96, "max_new_tokens": 6, "rank": 2, "passes": 1}
    whole = calibrate(pair, [0.0, 2.0], prompts, **how)
    monkeypatch.setattr(training, "KEEP_SECONDS", 0)
    monkeypatch.setattr(training, "KEEP_SHARE", float("inf"))
    out, stops = tmp_path / "deep" / "path.safetensors", [("sampling", 48), ("learning", 3), ("learning", 5)]
    if prompts is None:
        stops.insert(0, ("writing prompts", 48))
    for number, (stage, at) in enumerate(stops):

        def stop(what, done, total, stage=stage, at=at):
            if what.startswith(stage) and done >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(pair, [0.0, 2.0], prompts, **how, out=out, resume=number > 0, progress=stop)
    with pytest.raises(DeraError, match="--resume goes on"):
        calibrate(pair, [0.0, 2.0], prompts, **how, out=out)
    with pytest.raises(DeraError, match="begun by another call"):
        calibrate(pair, [0.0, 2.0], prompts, **how, seed=1, out=out, resume=True)
    seen = []
    again = calibrate(pair, [0.0, 2.0], prompts, **how, out=out, resume=True, progress=lambda *said: seen.append(said))
    assert not any(what == "writing prompts" for what, _, _ in seen)
    assert next(done for what, done, _ in seen if what == "learning") == 6, "what was learned is kept"
    for path in (again, Curve.load(out)):
        assert path.recipe == whole.recipe
        for name, part in whole.parts.items():
            assert all(torch.equal(value, getattr(path.parts[name], key)) for key, value in vars(part).items())
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    seen.clear()
    assert calibrate(pair, [0.0, 2.0], prompts, **how, out=out, resume=True, progress=lambda *said: seen.append(said)).sha256 == whole.sha256
    assert not seen, "there was nothing left to do"


def test_a_pair_without_prompts_writes_its_own(llama, lora):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    path = calibrate(pair, [0.0, 1.0], texts=24, max_new_tokens=6, rank=2)
    assert path.recipe["prompts"] == "written by the reference"
