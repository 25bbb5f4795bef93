"""What lies beside the weights: an output ends where it should, loads, and says what it is."""

import json
import shutil

import pytest
import torch
from builders import tokenizer, weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dera_merge import ModelPair
from dera_merge.errors import DeraError, DeraWarning


def edit(file, **change):
    """Change keys of a JSON file; None takes one out."""
    told = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({key: value for key, value in (told | change).items() if value is not None}))


@pytest.fixture
def sides(llama, tmp_path):
    """(reference, aligned): copies to change. Both end with 1, by all of their files."""
    return tuple(shutil.copytree(llama(seed), tmp_path / name) for seed, name in ((0, "ref"), (1, "aligned")))


def ends(folder):
    """What transformers ends a text with, as a set, and what config.json says."""
    told = GenerationConfig.from_pretrained(folder).eos_token_id
    config = json.loads((folder / "config.json").read_text())["eos_token_id"]
    return [set(entry if isinstance(entry, list) else [entry]) for entry in (told, config)]


WAYS = {  # how ALIGNED says that it ends with token 5, and what it ends with by itself
    "a number in both configs": (lambda f: [edit(f / n, eos_token_id=5) for n in ("config.json", "generation_config.json")], {5}),
    "a list": (lambda f: edit(f / "generation_config.json", eos_token_id=[1, 5]), {1, 5}),
    "config alone": (lambda f: [(f / "generation_config.json").unlink(), edit(f / "config.json", eos_token_id=5),
                                edit(f / "tokenizer_config.json", eos_token="w5")], {5}),
    "tokenizer alone": (lambda f: [(f / "generation_config.json").unlink(), edit(f / "config.json", eos_token_id=None),
                                   edit(f / "tokenizer_config.json", eos_token={"content": "w5"})], {5}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_ends_as_each_side_does_at_its_end_and_as_either_does_elsewhere(sides, tmp_path, way):
    ref, aligned = sides
    spoil, alone = WAYS[way]
    spoil(aligned)
    pair = ModelPair.from_pretrained(ref, aligned)
    with pytest.warns(DeraWarning, match=r"end tokens \(.*ref: 1; .*aligned: (5|1, 5|5, 1)\)"):
        folders = dict(zip((0.0, 0.5, 1.0, 2.0), pair.merge(tmp_path / "out", [0, 0.5, 1, 2]), strict=True))
    assert ends(folders[0.0]) == [{1}, {1}]
    assert ends(folders[1.0])[0] == alone
    for lam in (0.5, 2.0):
        assert ends(folders[lam]) == [{1, 5}, {1, 5}]
    for model in (pair.exact(0.5), pair.merged(0.5)):
        assert set(model.generation_config.eos_token_id) == {1, 5}


def test_at_an_end_a_sides_own_generation_config_is_kept_whole_and_says_what_it_lacks(sides, tmp_path):
    ref, aligned = sides
    edit(aligned / "generation_config.json", temperature=0.7)
    edit(aligned / "tokenizer_config.json", eos_token="w5")
    pair = ModelPair.from_pretrained(ref, aligned)
    with pytest.warns(DeraWarning, match="other files of it call 5 an end"):
        (folder,) = pair.merge(tmp_path / "one", [1])
    assert json.loads((folder / "generation_config.json").read_text()) == json.loads(
        (aligned / "generation_config.json").read_text()
    )
    assert ends(folder) == [{1}, {1}]


def test_an_adapter_that_brings_a_tokenizer_with_another_end_ends_there(llama, lora, tmp_path):
    adapter = shutil.copytree(lora(llama(0)), tmp_path / "adapter")
    tokenizer().save_pretrained(adapter)
    edit(adapter / "tokenizer_config.json", eos_token="w5")
    pair = ModelPair.from_pretrained(llama(0), adapter)
    for number, (lams, expected) in enumerate((([1], {1, 5}), ([0], {1}), ([3], {1, 5}))):
        (folder,) = pair.merge(tmp_path / str(number), lams)
        assert ends(folder)[0] == expected
    with pytest.warns(DeraWarning, match="call 5 an end too"):
        pair.merge(tmp_path / "adapters", [0.5], format="adapter")


def test_an_end_that_is_no_token_of_the_model_is_none(sides, tmp_path):
    ref, aligned = sides
    edit(aligned / "tokenizer_config.json", eos_token="<|missing|>")
    edit(aligned / "generation_config.json", eos_token_id="w5")
    (folder,) = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0.5])
    assert ends(folder) == [{1}, {1}]


def test_of_several_aligned_models_each_end_counts(sides, llama, tmp_path):
    ref, first = sides
    second = shutil.copytree(llama(2), tmp_path / "second")
    for folder, end in ((first, 5), (second, 6)):
        edit(folder / "generation_config.json", eos_token_id=end)
        edit(folder / "config.json", eos_token_id=end)
    pair = ModelPair.from_pretrained(ref, [first, second])
    expected = {(0, 0): {1}, (1, 0): {5, 1}, (0, 1): {6, 1}, (0.5, 0.5): {1, 5, 6}, (1, 1): {1, 5, 6}}
    edit(first / "generation_config.json", eos_token_id=[5, 1])
    edit(second / "generation_config.json", eos_token_id=[6, 1])
    for (lam, tokens), folder in zip(expected.items(), pair.merge(tmp_path / "out", list(expected)), strict=True):
        assert ends(folder)[0] == tokens, lam


def test_an_exported_pair_ends_as_either_side_does(sides, tmp_path):
    ref, aligned = sides
    edit(aligned / "generation_config.json", eos_token_id=5)
    ModelPair.from_pretrained(ref, aligned).export_exact(tmp_path / "out", 0.5)
    assert set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == {1, 5}


def test_where_all_agree_generation_config_keeps_what_it_says(sides, tmp_path, recwarn):
    ref, aligned = sides
    edit(aligned / "generation_config.json", temperature=0.7, do_sample=True)
    (folder,) = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0.5])
    told = [json.loads((place / "generation_config.json").read_text()) for place in (folder, aligned)]
    assert told[0] == told[1]
    assert not [warning for warning in recwarn if issubclass(warning.category, DeraWarning)]


# What is not copied


def test_settings_that_would_be_wrong_in_the_output_are_not_copied(sides, tmp_path):
    ref, aligned = sides
    wrong = {"_name_or_path": "/home/someone/run", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
             "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}  # fmt: skip
    edit(ref / "config.json", **wrong)
    edit(aligned / "tokenizer_config.json", name_or_path="/home/someone/run", auto_map={"AutoTokenizer": ["x.Y", None]})
    pair = ModelPair.from_pretrained(ref, aligned)
    (folder,) = pair.merge(tmp_path / "out", [0.5])
    for name in ("config.json", "tokenizer_config.json"):
        assert not ({*wrong, "name_or_path"} & json.loads((folder / name).read_text()).keys()), name
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<end>"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    live = pair.merged(0.5, dtype="auto", compute_dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, live(ids).logits)
    assert torch.isfinite(pair.exact(0.5)(ids).logits).all()


def test_code_that_comes_along_keeps_its_entry(sides, tmp_path):
    ref, aligned = sides
    (ref / "configuration_x.py").write_text("X = 1\n")
    edit(ref / "config.json", auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    (folder,) = ModelPair.from_pretrained(ref, aligned, trust_remote_code=True).merge(tmp_path / "out", [0.5])
    assert (folder / "configuration_x.py").is_file()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {"AutoConfig": "configuration_x.X"}


FOREIGN = {
    "tokenizer.json": '{"auths": {"registry": "secret"}}', "tokenizer_config.json": "[1, 2]",
    "generation_config.json": "root:x:0:0:root", "special_tokens_map.json": '{"auths": "secret"}',
    "vocab.json": '{"a": "b"}', "merges.txt": "root:x:0:0:root:/root:/bin/sh\n", "chat_template.jinja": "root:x:0:0\n",
    "tokenizer.model": "root:x:0:0\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_link_to_a_foreign_file_in_the_place_of_a_companion_is_refused(sides, tmp_path, name):
    ref, aligned = sides
    (tmp_path / "foreign").write_text(FOREIGN[name])
    (aligned / name).unlink(missing_ok=True)
    (aligned / name).symlink_to(tmp_path / "foreign")
    with pytest.raises(DeraError) as error:
        ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0.5])
    assert name.split(".")[0] in str(error.value)
    assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", '{"auths": {}}', "{"])
def test_a_generation_config_that_is_none_is_one_line_for_live_models_too(sides, content):
    ref, aligned = sides
    (aligned / "generation_config.json").write_text(content)
    for load in (ModelPair.exact, ModelPair.merged):
        with pytest.raises(DeraError, match=r"generation_config\.json"):
            load(ModelPair.from_pretrained(ref, aligned), 0.5)


# Adapters


def test_an_adapter_of_a_relative_path_names_its_base_so_that_peft_finds_it(llama, lora, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    base = shutil.copytree(llama(0), tmp_path / "here" / "base")
    adapter = shutil.copytree(lora(llama(0)), tmp_path / "here" / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path="../base")
    other = shutil.copytree(adapter, tmp_path / "here" / "other")
    save_file({k: 2 * t for k, t in weights(adapter).items()}, other / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path / "here")
    ModelPair.from_pretrained("base", "adapter").merge("../one", [0.5], format="adapter")
    ModelPair.from_pretrained("adapter", "other").merge("../two", [0.5], format="adapter")  # the base that they name
    monkeypatch.chdir("/")
    for name in ("one", "two"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.get_base_model().config.vocab_size == json.loads((base / "config.json").read_text())["vocab_size"]
