"""Images as people give them: a processor beside the model, files of pictures, messages that show them."""

import json

import numpy as np
import pytest
import torch
from builders import tokenizer
from commands import run
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor
from wrapped import IMAGE, class_of, tiny

from dera_merge import DeraError, ModelPair
from dera_merge.calibrating.calibrate import calibrate
from dera_merge.choosing.sweep import sweep
from dera_merge.texts import prompts
from dera_merge.texts.generate import decode

pytestmark = pytest.mark.core

WORDS = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, IMAGE)}, "<image>": IMAGE, "w61": 61, "w62": 62}
TEMPLATE = (
    "{% for m in messages %}w3 {% for p in m['content'] %}{{ '<image> ' if p['type'] == 'image' else p['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)
NEW = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny LLaVA pair; only the reference brings a processor, as where a trainer saved model and tokenizer alone."""
    made = [tmp_path_factory.mktemp(name) for name in ("ref", "aligned")]
    words = tokenizer(WORDS)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.chat_template = TEMPLATE
    sees = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    processor = LlavaProcessor(
        sees, words, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    for seed, folder in enumerate(made):
        tiny("Llava", seed).save_pretrained(folder)
        words.save_pretrained(folder)
    processor.save_pretrained(made[0])
    return made


@pytest.fixture(scope="module")
def pair(folders):
    return ModelPair.from_pretrained(*folders)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def own(folder, processor_folder, picture, prompt):
    """What transformers' own processor and model make of it."""
    processor = AutoProcessor.from_pretrained(processor_folder)
    turn = [{"type": "image", "path": str(picture)}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = class_of("Llava").from_pretrained(folder, dtype=torch.float32).eval()
    assert (inputs["input_ids"] == IMAGE).sum() == 16
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return inputs["input_ids"].shape[1], output[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_prompt_with_an_image_is_what_transformers_makes_of_it(folders, pair, picture):
    for lam, folder in enumerate(folders):
        count, tokens = own(folder, folders[0], picture, "w5 w9")
        for mode in ("exact", "merged"):
            got = decode(pair, lam, "w5 w9", images=[picture], mode=mode, max_new_tokens=NEW)
            assert (got["prompt_tokens"], got["token_ids"]) == (count, tokens)


def test_a_merge_brings_the_processor_that_only_the_reference_had(folders, pair, picture, tmp_path):
    (out,) = pair.merge(tmp_path / "out", [0.5])
    _, tokens = own(out, out, picture, "w5 w9")
    assert type(AutoProcessor.from_pretrained(out)) is LlavaProcessor
    assert decode(pair, 0.5, "w5 w9", images=[picture], mode="merged", max_new_tokens=NEW)["token_ids"] == tokens
    assert pair.merge(tmp_path / "out", [0.5], overwrite=True) == [out], "its own files, the processor's included"


def test_the_command_line_shows_an_image(folders, picture):
    _, tokens = own(folders[1], folders[0], picture, "w5 w9")
    command = ["generate", *folders, "-l", "1", "--prompt", "w5 w9", "--image", picture]
    done = run(*command, "--max-new-tokens", NEW, "--device", "cpu", "--json")
    assert json.loads(done.stdout)["token_ids"] == tokens, done.stderr


@torch.no_grad()
def test_prompt_files_with_images_are_measured_and_swept_and_no_path_is_learned_from_them(folders, pair, picture, tmp_path):
    parts = [{"type": "image", "path": picture.name}, {"type": "text", "text": "w5 w9"}]
    rows = [{"messages": [{"role": "user", "content": parts}]}, {"messages": [{"role": "user", "content": "w5 w9"}]}]
    asked, scored = picture.parent / "asked.jsonl", picture.parent / "scored.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored.write_text(json.dumps(rows[0] | {"completion": "w12 w33"}))
    done = run("compare", *folders, "-l", 0.5, "--prompts", scored, "-o", tmp_path / "report", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    processor = AutoProcessor.from_pretrained(folders[0])
    turn = [{"role": "user", "content": [parts[0] | {"path": str(picture)}, parts[1]]}]
    inputs = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[12, 33]])], 1)
    trio = *(class_of("Llava").from_pretrained(folder).eval() for folder in folders), pair.merged(0.5)
    ref, aligned, merged = (
        m(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, start - 1 : -1].double() for m in trio
    )
    log_p, log_q = ((ref + aligned) / 2).log_softmax(-1), merged.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert json.loads(done.stdout)["results"][0]["kl"] == pytest.approx(kl, rel=1e-3)

    swept = sweep(pair, prompts.read(asked), [len], lams=[0.0, 1.0], reweight=False, max_new_tokens=4, check=False)
    assert {answer.prompt for answer in swept.answers} == {0, 1}
    with pytest.raises(DeraError, match="prompt 1 shows an image"):
        calibrate(pair, [0.5], prompts.read(asked))


def test_what_cannot_be_seen_is_refused_in_one_line(pair, picture, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for images, message in (
        ([tmp_path / "none.png"], "there is no image"),
        ([tmp_path / "text.png"], "cannot be read"),
        (["https://example.org/a.png"], "there is no image"),
    ):
        with pytest.raises(DeraError, match=message) as refusal:
            decode(pair, 0.5, "w5", images=images)
        assert "\n" not in str(refusal.value)
    with pytest.raises(DeraError, match="a draft reads no images"):
        decode(pair, 0.5, "w5", images=[picture], mode="speculative")


def test_a_pair_without_a_processor_says_so(llama, picture):
    pair = ModelPair.from_pretrained(llama(0), llama(1))
    with pytest.raises(DeraError, match="brings a processor for images"):
        decode(pair, 0.5, "w5", images=[picture])


def test_prompt_files_show_images_found_from_where_the_file_lies(picture):
    parts = [{"type": "image", "path": picture.name}, {"type": "text", "text": "w5"}]
    file = picture.parent / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    (entry,) = prompts.read(file)
    assert entry["messages"][0]["content"][0] == {"type": "image", "path": str(picture)}
    for broken in ([{"type": "image", "path": "none.png"}], [{"type": "image", "url": "https://a.b/c"}], [], [5], "", None):
        file.write_text(json.dumps({"messages": [{"role": "user", "content": broken}]}))
        if broken == "":
            continue
        with pytest.raises(DeraError, match="line 1: .*(image|messages)"):
            prompts.read(file)


def test_parts_that_are_all_texts_are_one_text_for_templates_that_know_no_parts(tmp_path):
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w9"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    (prompt,) = prompts.encode(prompts.read(tmp_path / "prompts.jsonl"), tokenizer())
    assert prompt.ids == [3, 5, 9, 4]
