"""Adapters on adapters: SFT by one adapter, then DPO by another, in the layouts that training leaves."""

import json
import shutil
from inspect import signature

import pytest
import torch
from builders import weights
from commands import run
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dera_merge import DeraForCausalLM, ModelPair, compare
from dera_merge.cli import COMMANDS
from dera_merge.errors import DeraError, DeraWarning

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
KINDS = {
    "lora": {}, "dora": {"use_dora": True}, "trained whole": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}  # fmt: skip


def rename(adapter, base):
    """Change what base an adapter names."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return adapter


@pytest.fixture
def layout(llama, lora, tmp_path):
    """Makes (base, SFT adapter, DPO adapter that names `named`): `layout(named, kind)`."""

    def make(named, sft="lora", dpo="lora"):
        base = llama(0, dtype=torch.float32, tie_word_embeddings=False)
        first = shutil.copytree(lora(base, 7, **KINDS[sft]), tmp_path / "sft")
        second = shutil.copytree(lora(base, 8, r=2, **KINDS[dpo]), tmp_path / "dpo")
        return base, first, rename(second, named or str(base))

    return make


def by_peft(base, *adapters):
    """The oracle: each adapter but the last merged into the base in memory, the last as PEFT's own forward."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1]).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_on_refs_adapter_is_what_peft_makes_of_both(layout, tmp_path, kind):
    base, sft, dpo = layout(None, "lora", kind)
    pair = ModelPair.from_pretrained(sft, dpo, stack=True)
    ref, aligned = logits(by_peft(base, sft)), logits(by_peft(base, sft, dpo))
    (one,) = pair.merge(tmp_path / "one", [1])
    merged = AutoModelForCausalLM.from_pretrained(one)
    assert torch.allclose(logits(merged), aligned, atol=2e-5)
    assert torch.equal(logits(pair.merged(1)), logits(merged))
    exact = pair.exact(0.4)
    assert torch.allclose(logits(exact), 0.6 * ref + 0.4 * aligned, atol=2e-5)
    sizes = {p.data_ptr(): p.numel() for p in exact.parameters()}  # what all models hold
    assert exact.rows is not None
    if kind == "lora":  # one set of weights, and three small adapters
        assert sum(sizes.values()) < 1.3 * AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert (ref - aligned).abs().max() > 0.05


def test_a_doras_own_adapter_below_is_merged_first(layout):
    base, sft, dpo = layout(None, "dora", "lora")
    exact = ModelPair.from_pretrained(sft, dpo, stack=True).exact(1.0)
    assert torch.allclose(logits(exact), logits(by_peft(base, sft, dpo)), atol=2e-5)
    live = ModelPair.from_pretrained(sft, dpo, stack=True).merged(1.0)
    assert torch.allclose(logits(live), logits(by_peft(base, sft, dpo)), atol=2e-5)


def test_a_stacked_merge_lies_on_the_line_and_is_an_adapter_of_both_ranks(layout, tmp_path):
    base, sft, dpo = layout(None)
    pair = ModelPair.from_pretrained(sft, dpo, stack=True)
    (full,) = pair.merge(tmp_path / "full", [0.5])
    ref, aligned = (weights(pair.merge(tmp_path / str(lam), [lam])[0]) for lam in (0, 1))
    for name, tensor in weights(full).items():
        middle = (ref[name].double() + aligned[name].double()) / 2
        assert torch.allclose(tensor.double(), middle, atol=1e-6), name
    (adapter,) = pair.merge(tmp_path / "adapter", [0.5], format="adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4 + 2  # SFT's, and DPO's on top
    assert torch.allclose(logits(by_peft(base, adapter)), logits(AutoModelForCausalLM.from_pretrained(full)), atol=2e-5)


@pytest.mark.parametrize("named", ["../sft", "absolute"])
def test_an_adapter_that_names_ref_is_stacked_without_a_word(layout, tmp_path, recwarn, named):
    base, sft, dpo = layout(str(tmp_path / "sft") if named == "absolute" else named)
    exact = ModelPair.from_pretrained(sft, dpo).exact(1.0)
    assert torch.allclose(logits(exact), logits(by_peft(base, sft, dpo)), atol=2e-5)
    assert not [warning for warning in recwarn if issubclass(warning.category, DeraWarning)]


def test_a_merged_sft_model_that_is_gone_is_what_stack_is_for(layout):
    base, sft, dpo = layout("/gone/sft-merged")
    with pytest.raises(DeraError, match=r"/gone/sft-merged.*pass --stack"):
        ModelPair.from_pretrained(sft, dpo)
    exact = ModelPair.from_pretrained(sft, dpo, stack=True).exact(1.0)
    assert torch.allclose(logits(exact), logits(by_peft(base, sft, dpo)), atol=2e-5)


def test_two_adapters_of_one_base_are_taken_to_stand_alone_with_a_warning(layout, recwarn):
    base, sft, dpo = layout(None)
    with pytest.warns(DeraWarning, match=r"--stack puts it on REF's adapter.*--no-stack"):
        pair = ModelPair.from_pretrained(sft, dpo)
    assert torch.allclose(logits(pair.exact(1.0)), logits(by_peft(base, dpo)), atol=2e-5)
    recwarn.clear()
    ModelPair.from_pretrained(sft, dpo, stack=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, DeraWarning)]


def test_an_adapter_that_went_on_from_refs_is_known_by_its_weights(layout, recwarn):
    base, sft, dpo = layout(None)
    shutil.rmtree(dpo)
    shutil.copytree(sft, dpo)
    torch.manual_seed(0)
    moved = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in weights(sft).items()}
    save_file(moved, dpo / "adapter_model.safetensors")
    pair = ModelPair.from_pretrained(sft, dpo)
    assert not [warning for warning in recwarn if issubclass(warning.category, DeraWarning)]
    assert torch.allclose(logits(pair.exact(1.0)), logits(by_peft(base, dpo)), atol=2e-5)
    with pytest.warns(DeraWarning, match="trained further"):
        ModelPair.from_pretrained(sft, dpo, stack=True)


def test_an_adapter_that_names_another_adapter_is_refused_with_what_to_type(layout, llama, tmp_path):
    base, sft, dpo = layout("../sft")
    other = rename(shutil.copytree(sft, tmp_path / "other"), str(base))
    for ref, way_out in ((base, f"--base {base}"), (other, "--stack")):
        with pytest.raises(DeraError, match="an adapter itself") as error:
            ModelPair.from_pretrained(ref, dpo)
        assert f"dera-merge merge {sft.resolve()} {dpo}" in str(error.value)
        assert way_out in str(error.value)
    (merged,) = ModelPair.from_pretrained(base, sft).merge(tmp_path / "merged", [1])
    exact = ModelPair.from_pretrained(merged, dpo, base=merged).exact(1.0)  # one way out
    assert torch.allclose(logits(exact), logits(by_peft(base, sft, dpo)), atol=2e-5)
    with pytest.raises(DeraError, match=r"merge BASE .* and pass --base DIR"):  # REF itself is the upper one
        ModelPair.from_pretrained(dpo, base)


@pytest.mark.parametrize("sides", ["full ref", "full aligned"])
def test_stack_is_for_two_adapters(layout, sides):
    base, sft, _ = layout(None)
    with pytest.raises(DeraError, match="is a full model"):
        ModelPair.from_pretrained(*((base, sft) if sides == "full ref" else (sft, base)), stack=True)


def test_a_saved_mixture_and_an_exported_one_are_stacked_again(layout, tmp_path):
    _, sft, dpo = layout(None)
    pair = ModelPair.from_pretrained(sft, dpo, stack=True)
    exact = pair.exact(0.7)
    exact.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(DeraForCausalLM.from_pretrained(tmp_path / "saved")), logits(exact))
    pair.export_exact(tmp_path / "exported", 0.7)
    assert torch.allclose(logits(DeraForCausalLM.from_pretrained(tmp_path / "exported")), logits(exact), atol=2e-5)


def test_compare_and_the_command_line_take_it(layout, tmp_path):
    base, sft, dpo = layout(None)
    report = compare(ModelPair.from_pretrained(sft, dpo, stack=True), [1.0], prompts=["w3 w4"], max_new_tokens=4,
                     dtype="float32")  # fmt: skip
    assert report.results[0]["kl"] < 1e-6
    done = run("merge", sft, dpo, "-l", 1, "-o", tmp_path / "out", "--stack")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "dera_merge.json").read_text())["stack"] is True
    assert "--stack" not in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), logits(by_peft(base, sft, dpo)), atol=2e-5)
    opening = {name for name, module in COMMANDS.items() if "stack" in signature(module.run).parameters}
    assert opening == {"merge", "export-exact", "generate", "compare", "calibrate", "inspect", "sweep", "play", "chat", "auto", "bench"}
