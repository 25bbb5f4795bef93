"""A doctor finds what is wrong with a directory, says where and what to do, and leaves healthy ones alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from builders import save_tokenizer, tiny_llama, weights
from commands import run
from safetensors.torch import load_file, save_file

from dera_merge import ModelPair, demo
from dera_merge.doctor.examine import examine

FULL, LORA = demo.REF, demo.ALIGNED_LORA


def ill(source: Path, place: Path, tensors=None, **files) -> Path:
    """A copy with its tensors changed (a dict → a dict), and JSON files changed: `config={…}`; None removes a key."""
    shutil.copytree(source, place)
    if tensors:
        (file,) = place.glob("*model.safetensors")
        changed = {k: v.contiguous().clone() for k, v in tensors(load_file(file)).items()}
        save_file(changed, file, metadata={"format": "pt"})
    for name, settings in files.items():
        content = json.loads((place / f"{name}.json").read_text()) | settings
        (place / f"{name}.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return place


def lines(folder, *arguments, **options) -> list[str]:
    result = examine(str(folder), *map(str, arguments), **options)
    assert result["broken"] == any(row["level"] == "broken" for row in result["findings"])
    return [f"{row['level']}: {row['where']}: {row['what']}; {row['do']}" for row in result["findings"]]


def only(folder, *arguments) -> str:
    (line,) = lines(folder, *arguments)
    return line


# Healthy ones


@pytest.mark.parametrize("folder", [demo.REF, demo.ALIGNED_LORA, demo.ALIGNED_DENSE], ids=lambda folder: folder.name)
def test_the_demo_pair_is_healthy(folder):
    result = examine(str(folder))
    assert result["findings"] == []
    assert set(result["loads"].values()) == {None}


def test_what_is_written_here_is_healthy(tmp_path):
    from dera_merge.serving.export import export_exact

    lora, dense = (ModelPair.from_pretrained(demo.REF, folder) for folder in (demo.ALIGNED_LORA, demo.ALIGNED_DENSE))
    lora.merge(tmp_path / "several", [0.5, 2])
    lora.merge(tmp_path / "adapter", [0.5], format="adapter")
    dense.merge(tmp_path / "wide", [0.5], dtype="float32", max_shard_size="1MB")
    export_exact(lora, tmp_path / "exact")
    for name in ("several", "adapter", "wide", "exact"):
        assert lines(tmp_path / name) == []
    assert lines(tmp_path / "adapter", demo.REF) == []
    assert lines(tmp_path / "wide", demo.REF) == []


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2_moe", "llama"])
def test_what_transformers_writes_is_healthy(tmp_path, kind, tie):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 1,
             "bos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": tie}  # fmt: skip
    more = {"qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                          "num_key_value_heads": 2, "intermediate_size": 48}}  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes, **more.get(kind, {"intermediate_size": 48} if kind != "gpt2" else {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    assert lines(tmp_path / "model") == []


# Files


def test_files_against_the_index(tmp_path, llama):
    folder = shutil.copytree(llama(1, shard="20KB"), tmp_path / "model")
    assert lines(folder) == []
    shutil.copy(llama(0) / "model.safetensors", folder)
    assert "two sets of weights" in only(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert only(folder).startswith("warning: pytorch_model.bin: it lies beside")
    (folder / "pytorch_model.bin").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight (1 such), which model.safetensors.index.json does not name" in only(folder)
    next(iter(folder.glob("model-00001*"))).unlink()
    assert "broken" in only(folder)


def test_a_directory_without_a_model_is_told_what_is_inside(tmp_path):
    shutil.copytree(demo.REF, tmp_path / "checkpoint-5")
    assert "checkpoint-5" in only(tmp_path)


def test_links_to_nothing_and_files_that_are_something_else(tmp_path):
    folder = ill(FULL, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "gone")
    assert "a link to a file that is not there" in only(folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text("[1]")
    assert "broken: generation_config.json: holds list, expected a JSON object" in lines(folder)[0]
    shutil.copy(FULL / "generation_config.json", folder)
    shutil.copy(FULL / "config.json", folder / "tokenizer.json")
    assert "tokenizer.json: it is JSON, but holds something else" in lines(folder)[0]


def test_a_tokenizer_that_is_not_there_stands_against_loading(tmp_path):
    folder = ill(FULL, tmp_path / "model")
    (folder / "tokenizer.json").write_text("")
    assert "tokenizer.json: it is empty; " in lines(folder)[0]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "gone")
    result = examine(str(folder))
    assert result["broken"]
    assert all("tokenizer.json: it is a link" in reason for reason in result["loads"].values())


def test_a_weight_file_of_any_name_that_nothing_reads_is_named_but_not_what_mistrals_programs_read(tmp_path):
    folder = ill(FULL, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert lines(folder) == []
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    assert "old.safetensors: it lies beside model.safetensors and is not read" in only(folder)


def test_what_is_its_own_base_is_no_merge_of_it_but_loads(tmp_path):
    result = examine(str(FULL), str(shutil.copytree(FULL, tmp_path / "copy")))
    (finding,) = result["findings"]
    assert (finding["level"], "Δ = 0" in finding["what"]) == ("broken", True)
    assert set(result["loads"].values()) == {None}


def test_a_config_that_is_no_json(tmp_path):
    for folder, name in ((FULL, "config.json"), (LORA, "adapter_config.json")):
        place = shutil.copytree(folder, tmp_path / folder.name)
        (place / name).write_text("{")
        assert "is not valid JSON" in only(place)


def test_a_merge_that_was_not_finished_and_one_that_was_changed(tmp_path):
    from dera_merge.merging.recipe import PARTIAL

    (out,) = ModelPair.from_pretrained(FULL, LORA).merge(tmp_path / "out", [0.5])
    (out / "tokenizer_config.json").write_text((out / "tokenizer_config.json").read_text() + "\n")
    assert "tokenizer_config.json is missing or has changed" in only(out)
    (out / "config.json").rename(out / PARTIAL)
    assert "--resume" in only(out)


# Names


def test_missing_unexpected_and_misplaced_names(tmp_path):
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    cases = {
        "missing": (lambda t: {k: v for k, v in t.items() if k != norm}, f"they lack {norm}, which would be made up"),
        "unexpected": (lambda t: t | {"model.extra.weight": torch.ones(2)}, "has no place for it"),
        "shape": (lambda t: t | {up: t[up][:5]}, f"{up}: it is [5, 128] in the file and [384, 128] by config.json"),
        "prefix": (lambda t: {k.replace("model.", "model.language_model."): v for k, v in t.items()}, "another prefix"),
        "wrapped": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "torch.compile"),
        "value": (lambda t: t | {"v_head.summary.weight": torch.ones(1, 128)}, "a value head"),
        "layers": (lambda t: {k: v for k, v in t.items() if "layers.3." not in k}, "end with layer 2"),
        "more": (lambda t: t | {k.replace("layers.3.", "layers.4."): v for k, v in t.items()}, "num_hidden_layers=4"),
        "mtp": (lambda t: t | {"mtp.fc.weight": torch.ones(2, 2)}, "multi-token prediction"),
        "zero3": (lambda t: {k: v if "norm" in k else v.new_empty(0) for k, v in t.items()}, "DeepSpeed ZeRO-3"),
        "nan": (lambda t: t | {norm: t[norm] * float("nan")}, "NaN or infinity"),
        "zeros": (lambda t: t | {up: t[up] * 0}, f"{up}: all of it is zero"),
    }
    for name, (change, words) in cases.items():
        assert words in only(ill(FULL, tmp_path / name, change)), name
    loads = examine(str(tmp_path / "value"))["loads"]
    assert loads["transformers"] is None
    assert "v_head" in loads["vLLM"]
    assert "v_head" in loads["llama.cpp"]


def test_what_the_doctor_says_of_missing_tensors_is_what_transformers_does(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = ill(FULL, tmp_path / "model", lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {"model.norm.weight"}
    assert "model.norm.weight" in only(folder)


def test_a_head_that_is_missing_or_is_not_the_embeddings(tmp_path):
    untied = ill(FULL, tmp_path / "untied", config={"tie_word_embeddings": False})
    assert "does not tie it to the embeddings" in only(untied)
    embeddings = "model.embed_tokens.weight"
    twice = ill(FULL, tmp_path / "twice", lambda t: t | {"lm_head.weight": t[embeddings]})
    assert lines(twice) == []
    other = ill(FULL, tmp_path / "other", lambda t: t | {"lm_head.weight": t[embeddings] * 2})
    assert "the two differ" in only(other)


def test_layers_for_multi_token_prediction_that_are_announced_and_not_there(tmp_path):
    assert "no such layers" in only(ill(FULL, tmp_path / "model", config={"num_nextn_predict_layers": 1}))


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config says gptq, and no tensor"),
     ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.quantization_config says fp8"),
     ({"dtype": "float32"}, "dtype float32"), ({"auto_map": {"AutoModel": "modeling_x.X"}}, "modeling_x.py"),
     ({"architectures": ["MarvelForCausalLM"]}, "has no class MarvelForCausalLM"), ({"architectures": None}, "no architectures"),
     ({"model_type": "marvel"}, "does not know the model type 'marvel'"),
     ({"model_type": "marvel", "auto_map": {"AutoConfig": "configuration_x.X"}}, "code of its own")],
)  # fmt: skip
def test_settings_that_the_tensors_belie(tmp_path, settings, words):
    assert words in "\n".join(lines(ill(FULL, tmp_path / "model", config=settings)))


def test_quantised_tensors_without_a_word(tmp_path):
    def quantise(tensors):
        return {k: v.to(torch.float8_e4m3fn) if "mlp" in k else v for k, v in tensors.items()}

    assert "is quantised (float8_e4m3fn), and config.json states none" in only(ill(FULL, tmp_path / "a", quantise))
    nested = ill(FULL, tmp_path / "b", quantise, config={"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    assert "where transformers does not look" in lines(nested)[0]
    stale = ill(FULL, tmp_path / "c")
    (stale / "quantize_config.json").write_text("{}")
    assert "left of a quantised model" in only(stale)


def test_a_model_that_bitsandbytes_quantised_is_healthy(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(FULL, quantization_config=settings).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FULL / name, tmp_path / "model")
    result = examine(str(tmp_path / "model"))
    assert result["findings"] == []
    assert "bitsandbytes" in result["loads"]["llama.cpp"]


# Endings


@pytest.mark.parametrize(
    ("files", "words"),
    [({"generation_config": {"eos_token_id": 5}}, "broken: generation_config.json: the chat template ends a turn with '<|end|>' (1)"),
     ({"generation_config": {"eos_token_id": 5}}, "so answers run on; add 1 to eos_token_id"),
     ({"generation_config": {"eos_token_id": None}}, "so answers run on"),
     ({"generation_config": {"eos_token_id": [1, 5000]}}, "beyond the vocabulary"),
     ({"generation_config": {"temperature": 0.5}}, "transformers will not save it"),
     ({"generation_config": {"early_stopping": "perhaps"}}, "transformers cannot read it"),
     ({"tokenizer_config": {"eos_token": "<|user|>"}}, "its eos_token is '<|user|>'"),
     ({"config": {"vocab_size": 1000}}, "by config.json (1 in all); correct vocab_size")],
)  # fmt: skip
def test_end_tokens_and_generation_settings(tmp_path, files, words):
    assert words in "\n".join(lines(ill(FULL, tmp_path / "model", **files)))


def test_tokens_that_have_no_row(tmp_path):
    from transformers import AutoTokenizer

    folder = ill(FULL, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    assert "ids up to 1024, and the embeddings have 1024 rows" in only(folder)
    assert examine(str(folder))["loads"]["llama.cpp"]


def test_a_chat_template_that_fails_and_a_missing_tokenizer(tmp_path):
    folder = ill(FULL, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "cannot be rendered: no" in only(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    result = examine(str(folder))
    assert [row["where"] for row in result["findings"]] == ["tokenizer"]
    assert not result["broken"]
    assert result["loads"]["vLLM"] == "there is no tokenizer"


# Adapters


def test_dead_and_broken_adapters(tmp_path):
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    cases = {
        "dead": (lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()}, {}, "changes nothing"),
        "part": (lambda t: {k: v * ("layers.0" in k) for k, v in t.items()}, {}, "21 of its 28 modules are zero"),
        "half": (lambda t: {k: v for k, v in t.items() if k != key}, {}, "lora_B.weight but no lora_A.weight"),
        "rank": (None, {"r": 3}, "adapter_config.json says 3"),
        "state": (lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()}, {}, "state_dict()"),
        "nan": (lambda t: t | {key: t[key] * float("nan")}, {}, "NaN or infinity"),
        "option": (None, {"use_marvels": True}, "use_marvels=True"),
        "type": (None, {"peft_type": "MARVEL"}, "does not know the type MARVEL"),
        "nowhere": (None, {"base_model_name_or_path": "/home/me/model"}, "/home/me/model is not there"),
        "silent": (None, {"base_model_name_or_path": None}, "does not say what model it adapts"),
    }
    for name, (change, settings, words) in cases.items():
        settings = {"base_model_name_or_path": "me/model", **settings}  # not here, so that it is examined by itself
        assert words in only(ill(LORA, tmp_path / name, change, adapter_config=settings)), name


def test_an_adapter_beside_its_base(tmp_path):
    """The base that it names is looked for beside it."""
    shutil.copytree(demo.REF, tmp_path / "reference")
    lacking = ill(LORA, tmp_path / "lacking", lambda t: {k: v for k, v in t.items() if "layers.3." not in k})
    assert "modules that its config names" in only(lacking)
    odd = ill(LORA, tmp_path / "odd", lambda t: {k.replace("model.layers", "model.decoder.layers"): v for k, v in t.items()})
    assert "the base's is model.layers.0" in only(odd)


def test_a_rank_that_vllm_must_be_told(tmp_path):
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(target_modules=["q_proj"], r=40, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert examine(str(tmp_path / "adapter"))["needs"] == {"vLLM": "--max-lora-rank 64"}


@pytest.mark.parametrize(
    ("config", "vllm", "llamacpp"),
    [(peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA", "DoRA"),
     (peft.LoraConfig(target_modules=["q_proj"], use_rslora=True), None, "rsLoRA"),
     (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save", "modules_to_save"),
     (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA", "LOHA")],
    ids=["dora", "rslora", "saved", "loha"],
)  # fmt: skip
def test_which_programs_take_an_adapter(tmp_path, config, vllm, llamacpp):
    model = peft.get_peft_model(tiny_llama(0), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    result = examine(str(tmp_path / "adapter"))
    assert not result["broken"]
    assert result["loads"]["PEFT"] is None
    for program, words in (("vLLM", vllm), ("llama.cpp", llamacpp)):
        said = result["loads"][program]
        assert said is None if words is None else words in said


# Against the base


def test_a_merge_that_lost_the_adapter_and_one_that_did_not(tmp_path):
    """What another tool may have written: rounded to nearest in a coarse dtype, and the base under another name."""
    ModelPair.from_pretrained(FULL, LORA).merge(tmp_path / "good", [1.0], dtype="float32")
    assert lines(tmp_path / "good", demo.REF, demo.ALIGNED_LORA) == []
    theirs, base = load_file(tmp_path / "good" / "model.safetensors"), weights(demo.REF)
    lost = ill(FULL, tmp_path / "lost", lambda _: {k: v if "mlp" in k else base[k] for k, v in theirs.items()})
    said = [line for line in lines(lost, demo.REF, demo.ALIGNED_LORA) if "keeps 0.0%" in line]
    assert said
    assert said[0].startswith("broken: model.layers.0.self_attn")
    same = shutil.copytree(demo.REF, tmp_path / "same")
    assert "Δ = 0" in only(same, demo.REF)
    assert "Δ = 0" not in "\n".join(lines(demo.ALIGNED_DENSE, demo.REF))


def test_an_adapter_that_its_base_is_too_coarse_for(tmp_path):
    faint = ill(LORA, tmp_path / "faint", lambda t: {k: v * (1e-4 if "lora_B" in k else 1) for k, v in t.items()})
    assert "--dtype float32" in only(faint, demo.REF)


def test_what_a_merge_of_ours_says_of_itself(tmp_path, llama):
    """Its recipe has the figures of its own λ, which `--adapter`, of λ=1, would get wrong."""
    import warnings

    half, faint = tmp_path / "half", tmp_path / "faint"
    ModelPair.from_pretrained(FULL, LORA).merge(half, [0.5], dtype="float32")
    assert lines(half, demo.REF, demo.ALIGNED_LORA) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ModelPair.from_pretrained(llama(0), llama(1)).merge(faint, [0.001], rounding="nearest")
    assert "at λ=0.001 nearest rounding keeps" in only(faint)


def test_a_change_that_rounding_to_nearest_took(tmp_path, llama):
    """Of a change of a thousandth of a weight bfloat16 keeps next to nothing; float32 all of it."""
    base = llama(0)
    torch.manual_seed(0)
    moved = {k: t.float() * (1 + 1e-3 * torch.randn(t.shape)) for k, t in weights(base).items()}
    near = ill(base, tmp_path / "near", lambda t: {k: v.to(t[k].dtype) for k, v in moved.items()})
    assert "moved by one ulp" in only(near, base)
    wide = ill(base, tmp_path / "wide", lambda _: moved, config={"dtype": "float32"})
    assert lines(wide, base) == []


# The command line


def test_the_command_says_a_line_a_finding_and_ends_with_3_if_something_is_broken(tmp_path):
    good = run("doctor", demo.REF)
    assert good.returncode == 0
    assert good.stdout.startswith("No findings")
    folder = ill(FULL, tmp_path / "model", config={"tie_word_embeddings": False, "dtype": "float32"})
    bad = run("doctor", folder)
    assert bad.returncode == 3
    rows = bad.stdout.splitlines()
    assert sorted(row.partition(":")[0] for row in rows[:2]) == ["BROKEN", "warning"]
    assert any(row.startswith("Not in vLLM: lm_head.weight") for row in rows)
    told = run("doctor", folder, "--json")
    assert told.returncode == 3
    assert {row["level"] for row in json.loads(told.stdout)["findings"]} == {"broken", "warning"}
    assert run("doctor", folder, "--adapter", LORA).returncode == 2
    assert run("doctor", tmp_path / "nothing").returncode == 1
