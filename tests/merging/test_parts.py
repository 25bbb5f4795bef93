"""λ for parts of a model: each tensor at the λ of the last pattern that fits it, recomputed here in float64."""

import json
import re

import pytest
import torch
from builders import save_tokenizer, weights
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraWarning, ModelPair, compare, demo
from dera_merge.measuring.inspection import describe
from dera_merge.merging.parts import ByPart, output_name, parse
from dera_merge.publishing.card import command, section

RULES = {"mlp": 0.8, "layers.1-9": 0.2, "down_proj": 1.0, "layers.2.mlp.up_proj": 0.0}


def own_lambda(name: str, lam: float) -> float:
    """What `RULES` say of a tensor, without the pattern language."""
    layer = int(found[1]) if (found := re.search(r"\.layers\.(\d+)\.", name)) else None
    if layer == 2 and ".mlp.up_proj." in name:
        return 0.0
    if ".down_proj." in name:
        return 1.0
    if layer is not None and 1 <= layer <= 9:
        return 0.2
    return 0.8 if ".mlp." in name else lam


@pytest.fixture(scope="module")
def sides():
    """θ_ref and θ_aligned of the demo pairs, adapters by PEFT's own merge, in float32."""
    model = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
    ref = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = PeftModel.from_pretrained(model, demo.ALIGNED_LORA).merge_and_unload().state_dict()
    dense = AutoModelForCausalLM.from_pretrained(demo.ALIGNED_DENSE, dtype=torch.float32).state_dict()
    return {demo.ALIGNED_LORA: (ref, lora), demo.ALIGNED_DENSE: (ref, dense)}


@pytest.mark.parametrize("aligned", [demo.ALIGNED_LORA, demo.ALIGNED_DENSE], ids=["lora", "dense"])
def test_every_tensor_is_at_the_lambda_of_the_last_pattern_that_fits_it(sides, tmp_path, aligned):
    pair = ModelPair.from_pretrained(demo.REF, aligned)
    (folder,) = pair.merge(tmp_path / "out", [0.5], dtype="float32", lambda_for=RULES)
    merged, (ref, end) = weights(folder), sides[aligned]
    seen = set()
    for name, tensor in merged.items():
        lam = own_lambda(name, 0.5)
        seen.add(lam)
        expected = ref[name].double() + lam * (end[name].double() - ref[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=3e-6, atol=1e-7)
        if lam in (0.0, 1.0) and aligned is demo.ALIGNED_DENSE:
            assert torch.equal(tensor, end[name] if lam else ref[name])
        if lam == 0.0:
            assert torch.equal(tensor, ref[name])
    assert seen == {0.0, 0.2, 0.5, 0.8, 1.0}
    live = pair.merged(0.1, lambda_for=RULES)
    live.set_lam(0.5)
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in merged.items())


def test_a_rounded_merge_of_parts_returns_each_sides_bits_at_its_ends(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE)
    (folder,) = pair.merge(tmp_path / "out", [1.7], lambda_for={"*": 0.0, "self_attn": 1.0})
    ref, aligned = weights(demo.REF), weights(demo.ALIGNED_DENSE)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, (aligned if ".self_attn." in name else ref)[name])


def test_an_adapter_of_parts_is_pefts_forward_of_the_merged_checkpoint(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    (full,) = pair.merge(tmp_path / "full", [0.5], dtype="float32", lambda_for=RULES)
    (adapter,) = pair.merge(tmp_path / "adapter", [0.5], format="adapter", dtype="float32", lambda_for=RULES)
    base = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 12, 33, 7, 8, 40, 21]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(full)(ids).logits
        theirs = PeftModel.from_pretrained(base, adapter)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_experts_have_a_lambda_each_in_the_file_and_live(tmp_path):
    for seed, place in enumerate(("ref", "aligned")):
        build("mixtral", seed).save_pretrained(tmp_path / place)
        save_tokenizer(tmp_path / place)
    pair = ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "aligned")
    rules = {"experts.0-1": 0.9, "layers.1.*.gate": 0.1}
    (folder,) = pair.merge(tmp_path / "out", [0.4], lambda_for=rules)
    ref, aligned = weights(tmp_path / "ref"), weights(tmp_path / "aligned")
    counts = dict.fromkeys((0.1, 0.4, 0.9), 0)
    for name, tensor in weights(folder).items():
        lam = 0.9 if re.search(r"experts\.[01]\.", name) else 0.1 if re.search(r"layers\.1\..*\.gate\.", name) else 0.4
        counts[lam] += 1
        expected = ref[name].double() + lam * (aligned[name].double() - ref[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert all(counts.values())
    live, loaded = pair.merged(0.4, lambda_for=rules), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


def test_several_aligned_models_have_a_vector_for_each_part(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, [demo.ALIGNED_LORA, demo.ALIGNED_BRIEF])
    (folder,) = pair.merge(tmp_path / "out", [(0.5, 0.25)], dtype="float32", lambda_for={"mlp": (0.0, 1.0)})
    (brief,) = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_BRIEF).merge(tmp_path / "brief", [1.0], dtype="float32")
    (both,) = pair.merge(tmp_path / "both", [(0.5, 0.25)], dtype="float32")
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(brief if ".mlp." in name else both)[name])


def test_what_was_asked_stands_in_the_recipe_the_name_and_the_cards_command(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    folders = pair.merge(tmp_path / "out", [0.5, 1], lambda_for={"mlp": 0.8, "layers.0-1": 1 / 3})
    assert [folder.name for folder in folders] == [f"lambda-{lam}_mlp-0.8_layers.0-1-0.3333333333333333" for lam in ("0.5", "1")]
    recipe = json.loads((folders[1] / "dera_merge.json").read_text())
    assert recipe["path"]["lambda_for"] == ["mlp=0.8", "layers.0-1=0.3333333333333333"]
    assert "--lambda-for mlp=0.8 --lambda-for layers.0-1=0.3333333333333333" in command(recipe)
    shown = section(recipe, None, "me/m", "main")
    assert "strength λ = 1, and at others in parts\n" in shown
    assert "The weights θ_ref + λΔ at" not in shown
    assert describe(str(folders[1]))["merged"]["lambda_for"] == recipe["path"]["lambda_for"]
    again = ModelPair.from_pretrained(folders[1], demo.ALIGNED_DENSE).merge(tmp_path / "again", [0.5])
    assert json.loads((again[0] / "dera_merge.json").read_text())["ref"]["merge"]["path"] == recipe["path"]
    many = {"kind": "by part", "sha256": "0123456789abcdef", "lambda_for": [f"layers.{n}=0.5" for n in range(40)]}
    assert output_name(0.5, many) == "lambda-0.5_parts-01234567"
    with pytest.raises(DeraError, match="--overwrite"):  # another call's output
        pair.merge(tmp_path / "out", [0.5, 1], lambda_for={"mlp": 0.8, "layers.0-1": 1 / 3}, dtype="float32")


def test_the_distance_of_such_a_merge_from_exact_dera_is_measured_at_any_lambda(tmp_path):
    """Of a merge whose parts have λ = 0.8 all of them, the one λ that is exact DeRa's is 0.8."""
    pair, prompts = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA), demo.prompts()[:4]
    how = {"max_new_tokens": 12, "extras": ()}
    report = compare(pair, [0.2, 0.8], prompts, lambda_for={"*": 0.8}, **how)
    line = compare(pair, [0.8], prompts, **how).at(0.8)
    assert report.at(0.8)["kl"] == pytest.approx(line["kl"], rel=1e-6)
    assert report.at(0.2)["kl"] > 10 * report.at(0.2)["line"]["kl"]
    assert report.settings["path"]["lambda_for"] == ["*=0.8"]
    pair.merge(tmp_path / "out", [0.5], lambda_for={"*": 0.8})
    written = compare(pair, [0.2, 0.8], prompts, approx=tmp_path / "out", **how)
    assert [written.at(lam)["kl"] for lam in (0.2, 0.8)] == [pytest.approx(report.at(lam)["kl"]) for lam in (0.2, 0.8)]
    assert written.settings["path"] == report.settings["path"]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"mpl": 0.8}, "matches no tensor of this model; near are mlp"),
        ({"layer.0-7": 0.8}, "near are layers"),
        ({"layers.7-0": 0.8}, "the smaller number comes first"),
        ({"mlp..up_proj": 0.8}, "is no pattern"),
        ({"mlp": float("nan")}, "λ must be finite"),
        ({"mlp": (0.5, 0.5)}, "there is one aligned model"),
        ({"*": 0.0}, "all tensors that differ are at 0"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_one_line(tmp_path, rules, words):
    with pytest.raises(DeraError, match=re.escape(words)):
        ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).merge(tmp_path / "out", [0.5], lambda_for=rules)
    assert not (tmp_path / "out").exists()


def test_a_tied_tensor_has_one_lambda_by_its_one_name(llama, tmp_path):
    sides = llama(0, tie_word_embeddings=True), llama(1, near=0, tie_word_embeddings=True)
    pair = ModelPair.from_pretrained(*sides)
    with pytest.raises(DeraError, match=r"lm_head\.weight is model\.embed_tokens\.weight, one tensor for both"):
        pair.merge(tmp_path / "out", [0.5], lambda_for={"lm_head": 0.8})
    model = pair.merged(0.5, lambda_for={"embed_tokens": 1.0})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.bfloat16(), weights(sides[1])["model.embed_tokens.weight"])


def test_a_part_that_is_the_same_on_all_sides_is_warned_of():
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    with pytest.warns(DeraWarning, match="norm changes nothing"):
        pair.merged(0.5, lambda_for={"norm": 0.8})


def test_a_range_that_runs_past_the_end_is_warned_of_and_one_within_is_not(recwarn):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    last = json.loads((demo.REF / "config.json").read_text())["num_hidden_layers"] - 1
    ByPart.of(pair, {f"model.layers.1-{last}.mlp": 0.8, f"0-{last}": 0.7})
    assert not [each for each in recwarn if each.category is DeraWarning]
    with pytest.warns(DeraWarning, match=f"layers.0-99.mlp: 0-99 goes on beyond {last}, which is the last there is"):
        ByPart.of(pair, {"layers.0-99.mlp": 0.8})


WORDS = st.sampled_from(["model", "layers", "h", "mlp", "up_proj", "norm", "weight", "0", "7", "17"])
NAMES = st.lists(WORDS, min_size=1, max_size=6).map(".".join)


@given(NAMES, st.integers(0, 5), st.integers(1, 6))
def test_any_run_of_a_names_words_matches_it_and_so_do_their_wildcards(name, start, count):
    words = name.split(".")[start : start + count] or [name.split(".")[0]]
    assert parse(".".join(words))(name)
    assert parse(".".join("*" for _ in words))(name)
    assert parse(".".join(word[:-1] + "?" for word in words))(name)
    assert not parse(f"{name}.x")(name)
    assert not parse(".".join([*words[:-1], words[-1] + "x"]))(name)


@given(NAMES, NAMES)
def test_a_pattern_without_wildcards_matches_where_its_words_stand_in_a_row(pattern, name):
    assert parse(pattern)(name) == (f".{pattern}." in f".{name}.")


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_range_holds_both_its_ends(first, last, number):
    if first > last:
        with pytest.raises(ValueError, match="range"):
            parse(f"layers.{first}-{last}")
    else:
        assert parse(f"layers.{first}-{last}")(f"model.layers.{number}.mlp.weight") == (first <= number <= last)


@settings(max_examples=50)
@given(st.text("ab1-*?.[] (", min_size=1, max_size=8))
def test_any_text_matches_a_name_like_itself_or_is_no_pattern(text):
    try:
        matches = parse(text)
    except ValueError:
        words = text.split(".")
        assert " " in text or "" in words or any(re.fullmatch(r"\d+-\d+", word) for word in words)
    else:
        assert re.search(r"\d-\d", text) or matches(f"model.{text}.weight")
