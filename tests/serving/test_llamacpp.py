"""One base and one adapter in llama.cpp, λ a number in the request; run by `make test-llamacpp`, which builds it.

The oracle is peft: the adapter unmerged, its scaling times λ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from engines import serving
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_merge import demo

pytestmark = pytest.mark.llamacpp
HOME = Path(os.environ.get("LLAMACPP", "build-llamacpp")).absolute()
LAMS = (0.0, 0.5, 1.0, 2.0)
NEW = 32  # tokens

# llama.cpp knows tokenizers by what they make of a sample text. It cannot know the demo's, which splits as GPT-2's does.
CONVERT = (
    "import runpy, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; "
    "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def convert(script: str, *arguments: object) -> None:
    source = HOME / "source"
    command = [sys.executable, "-c", CONVERT, source, source / script, *arguments, "--outtype", "f32"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


def complete(address: str, prompt: list[int], lam: float) -> list[int]:
    body = {
        "prompt": prompt, "n_predict": NEW, "temperature": 0, "lora": [{"id": 0, "scale": lam}], "return_tokens": True,
        "cache_prompt": False,
    }  # fmt: skip
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["tokens"]


def at(lam: float) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, demo.ALIGNED_LORA)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(lam)
    return model


def test_the_scale_of_a_request_is_lambda(tmp_path):
    assert run("merge", demo.REF, demo.ALIGNED_LORA, "-l", 1, "--format", "adapter", "-o", tmp_path / "adapter").returncode == 0
    convert("convert_hf_to_gguf.py", demo.REF, "--outfile", tmp_path / "base.gguf")
    convert("convert_lora_to_gguf.py", tmp_path / "adapter", "--base", demo.REF, "--outfile", tmp_path / "adapter.gguf")
    tokenizer = AutoTokenizer.from_pretrained(demo.REF)
    lines = (demo.FOLDER / "prompts.jsonl").read_text().splitlines()[:8]
    prompts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], add_generation_prompt=True, return_dict=False)
        for line in lines
    ]
    command = [
        HOME / "bin" / "llama-server", "-m", tmp_path / "base.gguf", "--lora", tmp_path / "adapter.gguf",
        "--lora-init-without-apply", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-c", 1024, "-np", 4, "-t", 2,
    ]  # fmt: skip
    with serving(command, tmp_path / "log") as address:
        answers = {lam: [complete(address, prompt, lam) for prompt in prompts] for lam in LAMS}
    for lam, found in answers.items():
        model = at(lam)
        for prompt, answer in zip(prompts, found, strict=True):
            ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0].tolist()
            expected = ids[len(prompt) :]
            assert answer == expected or answer == expected[:-1]  # without the end token
    assert answers[0.0] != answers[0.5] != answers[2.0]
