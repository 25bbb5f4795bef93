"""Files whose tensors are not the model's: experts one by one, other names, other shapes, and tensors of no model.

transformers writes the layout that a family's files have on the Hub, and with `save_original_format=False` that of
memory. Oracles: a state dict interpolated in memory, and PEFT's own unmerged forward.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import save_tokenizer, weights
from families import IDS, SMALL, build, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM
from transformers import Gemma3ForConditionalGeneration as Gemma3
from wrapped import class_of, tiny

from dera_merge import DeraError, DeraWarning, ModelPair
from dera_merge.models.architecture import Architecture
from dera_merge.models.names import match
from dera_merge.models.side import open_sides
from dera_merge.models.source import Source
from dera_merge.models.trust import NOTHING

pytestmark = pytest.mark.core

# Families whose files have other tensors than their model has, and where their experts are.
CONVERTED = {
    "mixtral": ["experts.gate_up_proj", "experts.down_proj"],
    "qwen3_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "deepseek_v3": ["experts.gate_up_proj", "experts.down_proj"],
    "glm4_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
}
FUSED = {
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "llama4_text": ["experts.gate_up_proj", "experts.down_proj"],
}
ATTENTION = {"deepseek_v3": ["q_b_proj", "kv_b_proj"], "phi3": ["qkv_proj"]}


def save(model, folder: Path, **how) -> Path:
    model.save_pretrained(folder, **how)
    save_tokenizer(folder)
    return folder


def load(folder: Path):
    """transformers' own model of a folder, which must hold all of it."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by family and layout, made when first asked for."""
    folders: dict[tuple[str, int, bool], Path] = {}

    def make(family: str, seed: int, as_in_memory: bool = False) -> Path:
        key = family, seed, as_in_memory
        if key not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[key] = save(build(family, seed), folder, save_original_format=not as_in_memory)
        return folders[key]

    return make


@pytest.mark.parametrize(
    ("family", "ref_in_memory"), [*((family, False) for family in CONVERTED), ("mixtral", True), ("nemotron_h", True)]
)
def test_two_layouts_of_one_model_merge_to_the_interpolation_of_what_transformers_loads(made, tmp_path, family, ref_in_memory):
    folders = made(family, 0, ref_in_memory), made(family, 1, not ref_in_memory)
    assert weights(folders[0]).keys() != weights(folders[1]).keys()
    ref, aligned = (load(folder).state_dict() for folder in folders)
    pair = ModelPair.from_pretrained(*folders)
    ends = pair.merge(tmp_path / "out", [0.0, 0.5, 1.0])
    assert weights(ends[0]).keys() == weights(folders[0]).keys()
    zero, half, one = (load(folder).state_dict() for folder in ends)
    for name, tensor in ref.items():
        assert torch.equal(zero[name], tensor)
        assert torch.equal(one[name], aligned[name])
        expected = (tensor.double() + aligned[name].double()) / 2
        torch.testing.assert_close(half[name].double(), expected, rtol=1e-6, atol=1e-7)
    live = pair.merged(1.0)
    live.set_lam(0.5)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, half[name])


@pytest.mark.parametrize("family", [*CONVERTED, *FUSED])
def test_lora_on_experts_and_attention_is_pefts_forward_in_the_file_and_live(made, tmp_path, family):
    base = made(family, 0)
    torch.manual_seed(5)
    adapted = get_peft_model(load(base), LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=ATTENTION.get(family, ["q_proj", "v_proj"]), target_parameters=(CONVERTED | FUSED)[family],
    ))  # fmt: skip
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert_is_pefts(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral"])
def test_dora_and_tokens_beside_it_are_pefts_forward_in_the_file_and_live(made, tmp_path, family):
    base = made(family, 0)
    torch.manual_seed(5)
    adapted = get_peft_model(load(base), LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", use_dora=True,
        target_modules=ATTENTION.get(family, ["q_proj", "v_proj"]), trainable_token_indices=[5, 9],
    ))  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name or "trainable_tokens" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert_is_pefts(base, tmp_path / "adapter", tmp_path / "out")


def assert_is_pefts(base: Path, adapter: Path, out: Path) -> Path:
    """The merge at λ=1, which computes what PEFT's unmerged model computes, from the file and live."""
    expected, plain = logits(PeftModel.from_pretrained(load(base), adapter)), logits(load(base))
    assert (expected - plain).abs().max() > 0.01
    pair = ModelPair.from_pretrained(base, adapter)
    (folder,) = pair.merge(out, [1.0])
    torch.testing.assert_close(logits(load(folder)), expected, rtol=1e-3, atol=1e-3)
    live = pair.merged(0.3)
    live.set_lam(1.0)
    torch.testing.assert_close(logits(live), expected, rtol=1e-3, atol=1e-3)
    assert weights(folder).keys() == weights(base).keys()
    return folder


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory) -> list[Path]:
    """A wrapped Gemma 3 as on the Hub, another under the names of memory, and a text-only one."""
    text = {key: value for key, value in config_of("gemma3_text").to_dict().items() if key in (*SMALL, "layer_types")}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folders = []
    for seed, make in enumerate((Gemma3(config), Gemma3(config), Gemma3ForCausalLM(config.text_config))):
        torch.manual_seed(seed)
        for parameter in make.parameters():
            parameter.data.normal_()
        folders.append(save(make, tmp_path_factory.mktemp("gemma3"), save_original_format=seed != 1))
    return folders


def matched(*folders: Path, adapter: Path | None = None):
    """The tensors of θ(λ) for these models, and where each has them; `adapter` is on the first one."""
    sources = [Source.locate(folder) for folder in (*folders, *([adapter] if adapter else []))]
    sides = open_sides(sources[0], sources[1:], None, NOTHING)
    return match(sides, lambda: Architecture.of(folders[0]))


def aligned_in(names) -> dict[str, torch.Tensor]:
    """The aligned model's tensors by the names of θ(λ)."""
    _, aligned = names.weights
    tensors = {name: aligned.stored.whole(key) for name, key in aligned.keys.items()}
    for name, tensor in tensors.items():
        rows = tensor.view(names.tensors[name].rows, *names.tensors[name].row_shape)
        aligned.adapt(name, 0, len(rows), rows)
    return tensors


def test_wrapped_models_are_one_whatever_release_named_their_tensors(gemmas):
    hub, memory, _ = gemmas
    assert {name.split(".")[0] for name in weights(hub)} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert {name.split(".")[0] for name in weights(memory)} == {"model"}
    read = aligned_in(matched(hub, memory))
    assert read.keys() == weights(hub).keys()
    stored = {name.removeprefix("model."): tensor for name, tensor in weights(memory).items()}
    for name, tensor in read.items():
        place = name.replace("language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower.")
        assert torch.equal(tensor, stored[place])


def test_a_text_model_beside_a_wrapped_one_is_its_text_and_the_towers_stay_refs(gemmas):
    wrapped, _, text = gemmas
    alone = "only one side has .*(vision_tower|multi_modal).* which the other is made without"
    with pytest.warns(DeraWarning, match=alone):
        read = aligned_in(matched(wrapped, text))
    assert read.keys() == {name for name in weights(wrapped) if name.startswith("language_model.")}
    stored = weights(text)
    for name, tensor in read.items():
        assert torch.equal(tensor, stored[name.removeprefix("language_model.")])
    with pytest.warns(DeraWarning, match=alone):
        read = aligned_in(matched(text, wrapped))
    assert read.keys() == weights(text).keys()
    stored = weights(wrapped)
    for name, tensor in read.items():
        assert torch.equal(tensor, stored[f"language_model.{name}"])


@pytest.mark.parametrize("decoder", ["model.language_model", "language_model.model"])
def test_a_wrapped_models_adapter_adds_its_sum_whatever_release_named_its_modules(gemmas, tmp_path, decoder):
    stored = weights(gemmas[0])
    torch.manual_seed(3)
    factors = {}
    for number in range(2):
        module = f"{decoder}.layers.{number}.self_attn.q_proj"
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 32)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(32, 2)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*\.q_proj").save_pretrained(tmp_path)
    read = aligned_in(matched(gemmas[0], adapter=tmp_path))
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        module = f"base_model.model.{name.removesuffix('.weight').replace('language_model.model', decoder)}"
        change = torch.zeros_like(tensor)
        if f"{module}.lora_A.weight" in factors:
            change = 2 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(read[name], tensor + change, rtol=1e-5, atol=1e-6)


# Linear layers of transformers 4, those of its experts and its router among them, which release 5 has as parameters.
FORMER = {
    "mixtral": ["w1", "w2", "w3", "gate", "q_proj"],
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj", "gate", "q_proj"],
}


@pytest.mark.parametrize("family", FORMER)
def test_an_adapter_saved_under_transformers_4_adds_its_sum_to_each_experts_tensor(made, tmp_path, family):
    base = made(family, 0)
    stored = weights(base)
    modules = [name.removesuffix(".weight") for name in stored if name.split(".")[-2] in FORMER[family]]
    torch.manual_seed(3)
    factors = {}
    for module in modules:
        out, into = stored[f"{module}.weight"].shape
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, into)
        factors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(out, 2)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=FORMER[family], base_model_name_or_path=str(base))
    config.save_pretrained(tmp_path / "adapter")
    merged = weights(assert_is_pefts(base, tmp_path / "adapter", tmp_path / "out"))
    for name, tensor in stored.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            change = 2 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            torch.testing.assert_close(merged[name], tensor + change, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(merged[name], tensor)


@pytest.mark.parametrize(("family", "layer"), [("mamba", "dt_proj"), ("jamba", "dt_proj"), ("longcat_flash", "classifier")])
def test_a_layer_that_the_model_reads_past_peft_is_refused_unless_nothing_was_learned_there(made, tmp_path, family, layer):
    base = made(family, 0)
    for learned in (True, False):
        torch.manual_seed(5)
        other = "in_proj" if layer == "dt_proj" else "down_proj"
        adapted = get_peft_model(load(base), LoraConfig(r=2, init_lora_weights=False, target_modules=[other, layer]))
        for name, parameter in adapted.named_parameters():
            if f".{layer}.lora_B" in name and not learned:
                parameter.data.zero_()
        adapter = tmp_path / f"adapter-{learned}"
        adapted.save_pretrained(adapter, save_embedding_layers=False)
        if learned:
            with pytest.raises(DeraError, match=f"{layer}.weight, which transformers' {family} reads past PEFT's layer"):
                ModelPair.from_pretrained(base, adapter).merge(tmp_path / "refused", [1.0])
        else:
            assert_is_pefts(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("ref_is_wrapped", [True, False])
def test_a_text_model_and_a_wrapped_one_merge_decode_and_turn_as_one_pair(gemmas, tmp_path, ref_is_wrapped):
    folders = (gemmas[0], gemmas[2]) if ref_is_wrapped else (gemmas[2], gemmas[0])
    classes = (Gemma3, Gemma3ForCausalLM) if ref_is_wrapped else (Gemma3ForCausalLM, Gemma3)
    ref, aligned = (logits(each.from_pretrained(folder).eval()) for each, folder in zip(classes, folders, strict=True))
    assert (ref - aligned).abs().max() > 0.01
    pair = ModelPair.from_pretrained(*folders)
    with pytest.warns(DeraWarning, match="the other is made without"):
        (folder,) = pair.merge(tmp_path / "out", [1.0])
    torch.testing.assert_close(logits(classes[0].from_pretrained(folder).eval()), aligned)
    live = pair.merged(0.5)
    live.set_lam(1.0)
    torch.testing.assert_close(logits(live), aligned)
    torch.testing.assert_close(logits(pair.exact(0.5)), (ref + aligned) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3_5", "Mistral3"])
def test_wrapped_models_under_the_names_of_two_releases_merge_to_the_interpolation(tmp_path, name):
    models = [tiny(name, seed) for seed in (0, 1)]
    folders = [save(model, tmp_path / str(n), save_original_format=n == 0) for n, model in enumerate(models)]
    assert weights(folders[0]).keys() != weights(folders[1]).keys() or name == "Qwen3_5"
    (folder,) = ModelPair.from_pretrained(*folders).merge(tmp_path / "out", [0.5])
    merged = class_of(name).from_pretrained(folder).state_dict()
    for key, ref in models[0].state_dict().items():
        expected = (ref.double() + models[1].state_dict()[key].double()) / 2
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-7)


def test_files_that_lack_an_expert_are_refused_in_one_line(made, tmp_path):
    folder, gone = tmp_path / "less", "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    shutil.copytree(made("mixtral", 0), folder)
    kept = {name: tensor for name, tensor in weights(folder).items() if name != gone}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for pair in ((folder, made("mixtral", 1, True)), (made("mixtral", 1, True), folder)):
        with pytest.raises(DeraError, match="do not make .*gate_up_proj.*is one missing") as refusal:
            ModelPair.from_pretrained(*pair).merge(tmp_path / "out", [0.5])
        assert "\n" not in str(refusal.value)


def test_tensors_of_no_model_stay_refs_and_do_not_stop_a_pair_of_two_layouts(made, tmp_path):
    folder, other, more = tmp_path / "mtp", made("qwen3_moe", 1, True), torch.randn(4, 4)
    shutil.copytree(made("qwen3_moe", 0), folder)
    save_file({**weights(folder), "mtp.fc.weight": more}, folder / "model.safetensors", {"format": "pt"})
    pair = ModelPair.from_pretrained(folder, other)
    with pytest.warns(DeraWarning, match="only one side has mtp.fc.weight, which no model that transformers builds uses"):
        (merged,) = pair.merge(tmp_path / "out", [1.0])
    assert torch.equal(weights(merged)["mtp.fc.weight"], more)
    torch.testing.assert_close(logits(load(merged)), logits(load(other)))
