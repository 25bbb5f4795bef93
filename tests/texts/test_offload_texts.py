"""Texts of exact DeRa sampled from the files: those of models that are held, for all λ in one batch, and told of before."""

from __future__ import annotations

import functools
import logging

import pytest
from commands import run

from dera_merge import DeraForCausalLM, ModelPair, compare, demo
from dera_merge.measuring.report import Report
from dera_merge.texts.generate import decode
from dera_merge.texts.prompts import built_in

LAMS, NEW = [0.5, 2.0], 4
PROMPTS = built_in()[:3]


def written(report: Report) -> list[str]:
    return ["".join(piece for piece, _ in entry["scored"]) for entry in report.texts]


@pytest.mark.parametrize(
    ("aligned", "batch_size", "batches"), [(demo.ALIGNED_DENSE, None, [6]), (demo.ALIGNED_LORA, 4, [4, 2])],
    ids=["dense", "lora"],
)  # fmt: skip
def test_a_comparison_of_texts_that_it_samples_is_the_same(aligned, batch_size, batches, caplog, monkeypatch):
    pair, rows, told = ModelPair.from_pretrained(demo.REF, aligned), [], []
    how = {"max_new_tokens": NEW, "extras": (), "seed": 1}
    held = compare(pair, LAMS, PROMPTS, **how)
    too_little = 4 * sum(info.numel for info in pair.tensors.values())  # which one model's weights alone would take
    forward = DeraForCausalLM.forward

    @functools.wraps(forward)  # `generate` looks at its arguments
    def spy(self, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(DeraForCausalLM, "forward", spy)
    with caplog.at_level(logging.INFO, "dera_merge"):
        read = compare(
            pair, LAMS, PROMPTS, **how, max_memory=too_little, batch_size=batch_size,
            progress=lambda what, done, total: told.append((what, done, total)),
        )  # fmt: skip
    assert list(dict.fromkeys(rows)) == batches  # texts of all λ together: a pass reads the weights once for all of them
    passes = len(batches) * NEW
    assert len(rows) <= passes
    assert written(read) == written(held)
    for one, other in zip(held.results, read.results, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-9)
    said = caplog.text
    assert "layer by layer: in float32" in said
    assert f"6 texts by {passes} passes, each of which reads" in said
    assert said.index("the first pass took") > said.index("each of which reads")
    assert [entry[1:] for entry in told if "sampling" in entry[0]][:2] == [(1, passes), (2, passes)]


@pytest.mark.parametrize("mode", ["exact", "merged"])
def test_one_prompt_is_answered_the_same_from_the_files(mode):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE)
    held, read = (
        decode(pair, 0.5, "The hotel is", mode=mode, max_new_tokens=5, offload=offload) for offload in (False, True)
    )
    assert held == read


def test_generate_says_that_it_takes_weights_from_the_files_and_why():
    command = ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "--prompt", "The", "--max-new-tokens", "2"]
    done = run(*command, "--max-memory", "1MB")
    assert done.returncode == 0
    assert "with offload: in float32 one model would take" in done.stderr
    assert "each token reads all weights from the files" in done.stderr.replace("\n", " ")
    drafted = run(*command, "--max-memory", "1MB", "--mode", "speculative")
    assert drafted.returncode == 2
    assert "--max-memory" in drafted.stderr
