"""Publishing, by the unmodified client, over HTTP, to a Hub on loopback: what lies there afterwards, and what never does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import weights
from commands import run
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import DeraError, ModelPair, compare, demo, push_to_hub
from dera_merge.publishing import card

TOKEN = "hf_this_is_a_secret"
CLIENT = """
import json, sys, warnings
import dera_merge
warnings.simplefilter("ignore")
said = []
for folder, repo_id, options in json.loads(sys.argv[1]):
    try:
        said.append(dera_merge.push_to_hub(folder, repo_id, **options).to_dict())
    except dera_merge.DeraError as error:
        said.append(str(error))
json.dump(said, sys.stdout)
"""


@pytest.fixture
def hub():
    with Hub({TOKEN: "me"}) as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}


def command(environment, *arguments):
    return run(*arguments, environment=environment)


def pushed(environment, *calls):
    """What each call of `push_to_hub` came to, all in one process: its plan, or its one line of refusal."""
    done = run(
        json.dumps([[str(folder), repo_id, options] for folder, repo_id, options in calls]),
        environment=environment,
        code=CLIENT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """λ = 0.25 and 0.5 of the demo pair."""
    folder = tmp_path_factory.mktemp("merged")
    ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE).merge(folder, [0.25, 0.5])
    return folder


def test_every_lambda_is_a_branch_that_transformers_loads(hub, environment, merged, tmp_path):
    done = command(environment, "push", merged, "me/model", "--main", "0.5", "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["commits"]) == ["lambda-0.25", "lambda-0.5", "main"]
    repo = hub.repos["me/model"]
    for branch, lam in (("lambda-0.25", 0.25), ("lambda-0.5", 0.5), ("main", 0.5)):
        local = merged / f"lambda-{lam:g}"
        for file in local.iterdir():
            assert repo.files(branch)[file.name] == file.read_bytes()
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained('me/model', revision='lambda-0.25')\n"
        "model = AutoModelForCausalLM.from_pretrained('me/model', revision='lambda-0.25')\n"
        "torch.save(model.state_dict(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "loaded.pt"], env=environment, check=True, timeout=120)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    for name, tensor in weights(merged / "lambda-0.25").items():
        assert torch.equal(loaded[name], tensor)
    said = command(environment, "inspect", "me/model@lambda-0.25").stdout
    assert "λ=0.25" in said
    again = command(environment, "push", merged, "me/model", "--main", "0.5", "--license", "mit")
    assert again.returncode == 0
    assert len(repo.commits) == 4, "nothing changed, so nothing is committed again"


@pytest.mark.slow
def test_vectors_of_lambda_are_branches_too(hub, environment, tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, [demo.ALIGNED_LORA, demo.ALIGNED_DENSE])
    pair.merge(tmp_path / "out", [(0.5, 0.25), (1.0, 1.0)])
    done = command(environment, "push", tmp_path / "out", "me/two", "--main", "0.5+0.25", "--license", "mit")
    assert done.returncode == 0, done.stderr
    repo, local = hub.repos["me/two"], tmp_path / "out" / "lambda-1+1"
    assert repo.files("lambda-1+1")["model.safetensors"] == (local / "model.safetensors").read_bytes()
    card = repo.files("main")["README.md"].decode()
    assert card.count("- aligned: ") == 2
    assert f"--aligned {demo.ALIGNED_DENSE}" in card
    said = command(environment, "inspect", "me/two@lambda-1+1").stdout
    assert "λ=1+1" in said


@pytest.mark.core
def test_a_dry_run_writes_nothing_and_shows_everything(hub, environment, merged):
    done = command(environment, "push", merged, "me/model", "--main", "none", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert not hub.repos
    for word in ("model.safetensors", "lambda-0.25", "me/model (new)", "base_model", "There are no weights on this branch"):
        assert word in done.stdout or word == "base_model"
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("way", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}, {"HF_TOKEN": "expired"}])
def test_a_plan_can_be_looked_at_without_the_hub(environment, merged, way):
    one = merged / "lambda-0.5"
    looked, sent = pushed(environment | way, (one, "me/x", {"dry_run": True}), (one, "me/x", {}))
    assert any("takes me/x to be new" in note for note in looked["notes"])
    assert "model.safetensors" in looked["branches"][0]["files"]
    assert any(word in sent for word in ("cannot be reached", "HF_HUB_OFFLINE", "hf auth login"))


def test_a_name_without_an_owner_asks_for_one_where_nobody_is_logged_in(merged, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DeraError, match="Give it as OWNER/model"):
        push_to_hub(merged / "lambda-0.5", "model", dry_run=True)


@pytest.mark.parametrize("fault", [ValueError, RuntimeError, OSError])
def test_a_fault_of_ours_in_planning_is_not_reported_as_the_hubs(merged, monkeypatch, fault):
    def broken(*args, **kwargs):
        raise fault("a fault of ours")

    monkeypatch.setattr(card, "section", broken)
    with pytest.raises(fault, match="a fault of ours"):
        push_to_hub(merged / "lambda-0.5", "me/model", dry_run=True)


@pytest.mark.slow
def test_an_exact_directory_loads_from_the_hub(hub, environment, tmp_path):
    """Its models lie in folders beside its config, whose names must not be taken for repositories."""
    ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).export_exact(tmp_path / "exact", 0.5)
    code = (
        "import sys, torch; from huggingface_hub import HfApi; from dera_merge import DeraForCausalLM\n"
        "HfApi().create_repo('me/exact'); HfApi().upload_folder(repo_id='me/exact', folder_path=sys.argv[1])\n"
        "model = DeraForCausalLM.from_pretrained('me/exact')\n"
        "torch.save(model(torch.arange(9)[None], lam=0.3).logits, sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "exact", tmp_path / "logits.pt"]
    subprocess.run(arguments, env=environment, check=True, timeout=120)
    expected = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).exact(0.3)(torch.arange(9)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_an_adapter_is_a_branch_that_peft_loads(hub, environment, tmp_path):
    ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).merge(tmp_path / "out", [0.5], format="adapter")
    done = command(environment, "push", tmp_path / "out", "me/adapter", "--revision", "half", "--license", "mit")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, 'me/adapter', revision='half')\n"
        "torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, demo.REF, tmp_path / "logits.pt"], env=environment, check=True, timeout=120)
    expected = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).merged(0.5)(torch.arange(8)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-4)
    assert "library_name: peft" in hub.repos["me/adapter"].files("half")["README.md"].decode()
    assert set(hub.repos["me/adapter"].files("main")) == {".gitattributes"}


def test_old_weights_go_in_the_same_commit_and_what_is_not_ours_stays(hub, environment, merged):
    old = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old", "pytorch_model.bin": b"old",
           "adapter_config.json": b"{}", "fidelity.json": b"{}", "notes.md": b"mine",
           "README.md": b"---\nlicense: mit  # as agreed\n---\n# Mine\n\nText.\n"}  # fmt: skip
    repo = hub.add("me/model", old)
    before = len(repo.commits)
    done = command(environment, "push", merged / "lambda-0.5", "me/model")
    assert done.returncode == 0, done.stderr
    assert len(repo.commits) == before + 1
    files = repo.files()
    written = {file.name for file in (merged / "lambda-0.5").iterdir()}
    assert set(files) == {".gitattributes", "notes.md", "README.md"} | written
    text = files["README.md"].decode()
    assert text.startswith("---\nlicense: mit  # as agreed\n")
    assert "---\n# Mine\n\nText.\n\n<!-- dera-merge: begin -->" in text


def test_what_cannot_be_published_is_refused_in_one_line(hub, environment, merged, llama, tmp_path):
    one = merged / "lambda-0.5"
    changed, partial = tmp_path / "changed", tmp_path / "partial"
    for folder in (changed, partial):
        folder.mkdir()
        for file in one.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    (partial / "config.json").unlink()
    (partial / "dera_merge.json").rename(partial / "dera_merge.partial.json")
    hub.add("me/public")
    hub.add("me/licensed", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.add("me/broken", {"README.md": b"---\na: [\n---\n"})
    escape = tmp_path / "escape"
    escape.mkdir()
    recipe = json.loads((one / "dera_merge.json").read_text())
    (escape / "dera_merge.json").write_text(json.dumps(recipe | {"files": {"../changed/config.json": "0" * 64}}))
    (escape / "config.json").write_text("{}")
    cases = [
        (tmp_path / "none", "me/x", {}, "no directory"),
        (merged, "me/x", {}, "--main"),
        (merged, "me/x", {"main": 0.75}, "no λ=0.75"),
        (merged, "me/x", {"main": 0.5, "create_pr": True}, "one λ"),
        (merged, "me/x", {"main": 0.5, "revision": "b"}, "--revision"),
        (one, "me/x", {"revision": "a b"}, "no name for a branch"),
        (one, "me/x/y", {}, "no id"),
        (changed, "me/x", {}, "changed since"),
        (partial, "me/x", {}, "partial"),
        (escape, "me/x", {}, "outside"),
        (llama(0), "me/x", {}, "not written by dera-merge"),
        (one, "me/public", {"private": True}, "public"),
        (one, "me/broken", {}, "metadata"),
        (one, "you/x", {}, "may not write"),
        (one, "me/x", {"license": "made-up"}, "does not accept"),
        (one, "me/x", {"token": "wrong"}, "hf auth login"),
    ]
    said = pushed(environment, *(case[:3] for case in cases))
    for (folder, _, options, word), line in zip(cases, said, strict=True):
        assert isinstance(line, str), (folder, options)
        assert word in line
        assert "\n" not in line
        assert TOKEN not in line
    assert set(hub.repos) == {"me/public", "me/licensed", "me/broken"}, "no repository is made for what is refused"
    for name in ("me/public", "me/licensed", "me/broken"):
        assert len(hub.repos[name].commits) <= 2


def test_whatever_the_hub_answers_is_one_line_and_main_stays(hub, environment, merged):
    """Each error at the commit of main, after everything else went well."""
    words = {400: "does not accept", 401: "hf auth login", 403: "write permission", 404: "finds no", 409: "run it again",
             412: "changed by someone", 500: "HTTP 500", 503: "HTTP 503"}  # fmt: skip
    before = {}
    for status in words:
        repo = hub.add(f"me/m{status}", {"model.safetensors": b"old", "README.md": b"old"})
        before[status] = repo.branches["main"]
        hub.fail("POST", f"/api/models/me/m{status}/commit/main", status, times=99)
    said = pushed(environment, *((merged, f"me/m{status}", {"main": 0.5}) for status in words))
    for (status, word), line in zip(words.items(), said, strict=True):
        assert isinstance(line, str), status
        assert word in line, line
        assert "\n" not in line
        assert hub.repos[f"me/m{status}"].branches["main"] == before[status]
        assert hub.repos[f"me/m{status}"].files()["model.safetensors"] == b"old"


def test_a_change_by_someone_else_is_not_written_over(hub, environment, merged):
    repo = hub.add("me/model", {"README.md": b"first"})
    hub.slow("POST", r"/api/models/me/model/preupload", 2.0, times=3)
    words = [sys.executable, "-m", "dera_merge", "push", str(merged / "lambda-0.5"), "me/model"]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    while not any("preupload" in request.path for request in hub.requests):
        assert process.poll() is None
        time.sleep(0.01)
    theirs = repo.push({"README.md": b"theirs"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "changed by someone else" in said
    assert repo.branches["main"] == theirs


@pytest.mark.parametrize("how", ["refused", pytest.param("cut", marks=pytest.mark.slow)])  # the client tries for 23 s
def test_a_broken_upload_leaves_main_and_a_second_run_uploads_what_is_missing(hub, environment, merged, how):
    repo = hub.add("me/model", {"model.safetensors": b"old"})
    before = repo.branches["main"]
    if how == "cut":
        hub.cut("/lfs/", after=1000, times=99)
    else:
        hub.fail("PUT", "/lfs/", 403, times=99)
    broken = command(environment, "push", merged, "me/model", "--main", "0.25")
    assert broken.returncode == 1
    assert ("run it again" if how == "cut" else "write permission") in broken.stderr.splitlines()[-1]
    assert repo.branches["main"] == before
    hub.faults.clear()
    assert command(environment, "push", merged, "me/model", "--main", "0.25").returncode == 0
    uploads = [request.path for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(uploads) == len(set(uploads)) == 2, "each weight file once, though λ=0.25 is on two branches"
    assert repo.files()["model.safetensors"] == (merged / "lambda-0.25" / "model.safetensors").read_bytes()


def test_a_connection_that_breaks_once_is_mended_by_itself(hub, environment, merged):
    hub.cut("/lfs/", after=1000)
    assert command(environment, "push", merged / "lambda-0.5", "me/model").returncode == 0
    assert hub.repos["me/model"].files()["model.safetensors"] == (merged / "lambda-0.5" / "model.safetensors").read_bytes()


def test_a_killed_push_leaves_main_as_it_was(hub, environment, merged):
    repo = hub.add("me/model", {"model.safetensors": b"old"})
    hub.slow("POST", "/commit/lambda-0.25", 5.0)
    words = [sys.executable, "-m", "dera_merge", "push", str(merged), "me/model", "--main", "0.5"]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    while not any("/commit/lambda-0.25" in request.path for request in hub.requests):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert repo.files()["model.safetensors"] == b"old"
    sent = len([request for request in hub.requests if request.method == "PUT"])
    assert command(environment, "push", merged, "me/model", "--main", "0.5").returncode == 0
    assert len([request for request in hub.requests if request.method == "PUT"]) == sent
    assert repo.files()["model.safetensors"] == (merged / "lambda-0.5" / "model.safetensors").read_bytes()


def test_a_rate_limit_is_waited_for_visibly_and_not_for_ever(hub, environment, merged):
    hub.fail("POST", "/api/models/me/model/commit/", 429, headers={"Retry-After": "1"})
    done = command(environment, "push", merged / "lambda-0.5", "me/model")
    assert done.returncode == 0, done.stderr
    assert "waiting 1 s" in done.stderr
    hub.fail("POST", "/api/models/me/model/commit/", 429, times=9, headers={"Retry-After": "4000"})
    done = command(environment, "push", merged / "lambda-0.25", "me/model")
    assert done.returncode == 1
    assert "try again later" in done.stderr


def test_the_token_is_sent_and_nothing_else_holds_it(hub, environment, merged, tmp_path):
    done = command(environment, "push", merged / "lambda-0.5", "me/model", "--private", "--create-pr", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.repos["me/model"].private
    assert hub.repos["me/model"].pull_requests
    assert set(hub.repos["me/model"].files()) == {".gitattributes"}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in request.body or TOKEN in request.path for request in hub.requests)
    stored = [file for folder in (tmp_path, merged) for file in folder.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in file.read_bytes() for file in stored)


def test_a_report_goes_with_its_weights_only(hub, environment, merged, tmp_path):
    from dera_merge import compare

    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE)
    how = {"prompts": demo.prompts()[:2], "max_new_tokens": 4, "extras": ()}
    measured = compare(pair, [0.25, 0.5], approx=merged, **how)
    measured.gate(1e-9, None)
    measured.save(tmp_path / "approx")
    compare(pair, [0.5], **how).save(tmp_path / "same")
    compare(pair, [0.5], **how, seed=1).save(tmp_path / "seed")
    compare(pair, [0.25], **how).save(tmp_path / "lambda")
    compare(ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA), [0.5], **how).save(tmp_path / "pair")
    one = merged / "lambda-0.5"
    hub.datasets.add("me/force")
    said = pushed(
        environment,
        *((one, "me/x", {"report": str(tmp_path / name)}) for name in ("seed", "lambda", "pair", "approx")),
        (one, "me/same", {"report": str(tmp_path / "same")}),
        (merged, "me/force", {"report": str(tmp_path / "approx"), "force": True, "main": "none"}),
    )
    for line, word in zip(said[:4], ("another seed", "no λ=0.5", "another pair", "--force"), strict=True):
        assert word in line
    assert "me/x" not in hub.repos
    assert any("dataset" in note for note in said[5]["notes"])
    files = hub.repos["me/same"].files()
    row = measured.at(0.5)
    (entry,) = yaml.safe_load(files["README.md"].decode().split("---\n")[1])["model-index"]
    values = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values["kl"] == pytest.approx(row["kl"], rel=0.05)
    assert all(value == float(f"{value:.4g}") for value in values.values())  # no more digits than mean something
    assert files["fidelity.png"].startswith(b"\x89PNG")
    assert row["verdict"] in files["README.md"].decode()
    assert set(hub.repos["me/force"].files()) == {".gitattributes", "README.md"}
    said = command(environment, "inspect", "me/same").stdout
    assert row["verdict"] in said
    assert "kl " in said


def test_a_vector_of_lambda_that_failed_the_gate_is_refused_from_disk_too(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, [demo.ALIGNED_LORA, demo.ALIGNED_BRIEF])
    (folder,) = pair.merge(tmp_path / "out", [(0.5, 0.25)])
    prompts = [prompt | {"completion": "A lovely film."} for prompt in demo.prompts()[:2]]
    report = compare(pair, [(0.5, 0.25)], prompts, approx=folder, extras=())
    assert not report.gate(max_kl=1e-9, min_top1=None)["passed"]
    report.save(tmp_path / "report")
    for source in (report, tmp_path / "report"):
        with pytest.raises(DeraError, match="failed the gate"):
            push_to_hub(folder, "me/model", report=source, dry_run=True)


@pytest.mark.slow
def test_parents_on_the_hub_give_licence_language_and_base_model(hub, environment, tmp_path):
    def files(folder: Path, readme: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()} | {"README.md": readme.encode()}

    hub.add("you/sft", files(demo.REF, "---\nlicense: apache-2.0\nlanguage: en\n---\n"))
    hub.add("you/dpo", files(demo.ALIGNED_DENSE, "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n"))
    hub.add("you/other", files(demo.ALIGNED_DENSE, "---\nlicense: llama3.1\n---\n"))
    code = (
        "import sys; from dera_merge import ModelPair\n"
        "for name in ('dpo', 'other'): ModelPair.from_pretrained('you/sft', f'you/{name}').merge(f'{sys.argv[1]}/{name}', [0.5])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True, timeout=120)
    said = pushed(
        environment, (tmp_path / "dpo", "me/same", {}), (tmp_path / "other", "me/differ", {}),
        (tmp_path / "other", "me/chosen", {"license": "llama3.1"}),
    )  # fmt: skip
    assert "licences differ" in said[1]
    text = hub.repos["me/same"].files()["README.md"].decode()
    values = card.read_metadata(text)
    assert values["base_model"] == ["you/sft", "you/dpo"]
    assert (values["base_model_relation"], values["license"], values["language"]) == ("merge", "apache-2.0", ["en", "de"])
    assert f"you/sft@{hub.repos['you/sft'].branches['main']}" in text
    assert card.read_metadata(hub.repos["me/chosen"].files()["README.md"].decode())["license"] == "llama3.1"
    # A merge of a merge says so.
    done = command(environment, "merge", "me/same", "you/dpo", "-l", "2", "-o", tmp_path / "twice")
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "twice" / "dera_merge.json").read_text())
    assert recipe["ref"]["merge"] == {"lambda": 0.5, "ref": "you/sft", "aligned": "you/dpo"}
    assert "is a merge itself" in command(environment, "inspect", tmp_path / "twice").stdout


# The card as text

RECIPE = {
    "ref": {"name": "acme/sft", "revision": "a" * 40}, "aligned": {"name": "dpo", "revision": None}, "lambda": 0.5,
    "dtype": "auto", "rounding": "stochastic", "seed": 0, "path": "line", "versions": {}, "files": {},
}  # fmt: skip


def ours(recipe=RECIPE):
    return card.metadata(recipe, None, "me/m", {"license": "mit"}), card.section(recipe, None, "me/m", "main")


def test_a_card_of_a_model_that_sees_loads_it_by_its_own_auto_class():
    files = {"files": {"model.safetensors": {}, "processor_config.json": {}}}
    section = card.section(RECIPE | files, None, "me/m", "main", sees=True)
    assert 'model = AutoModelForImageTextToText.from_pretrained("me/m")\nprocessor = AutoProcessor.' in section
    assert 'model = AutoModelForCausalLM.from_pretrained("me/m")\ntokenizer = AutoTokenizer.' in ours()[1]


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": ""}, {"tokenizer.json": "", "processor_config.json": ""}])
def test_a_card_of_an_adapter_puts_it_on_its_base_by_peft(files):
    section = ours(RECIPE | {"format": "adapter", "rank": 8, "files": files})[1]
    base = f'"acme/sft", revision="{"a" * 40}"'
    assert f".from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, \"me/m\")" in section
    assert f"vllm serve acme/sft --revision {'a' * 40} --enable-lora" in section
    sees = "processor_config.json" in files
    assert f"import {'AutoModelForImageTextToText, AutoProcessor' if sees else 'AutoModelForCausalLM, AutoTokenizer'}\n" in section
    last = section.partition("```python")[2].partition("```")[0].splitlines()[-1]
    assert last.endswith('.from_pretrained("me/m")' if files else f".from_pretrained({base})")


def test_only_what_is_ours_changes_in_a_card():
    there = (
        "---\n# a comment\nlanguage: [en]   # mine\ntags:\n- chat\n# between\nmodel-index:\n- name: other\n  results: []\n"
        "extra: |\n  many\n  lines\n---\n\n# Title\n\nBefore.\n\n<!-- dera-merge: begin -->\nold\n<!-- dera-merge: end -->\nAfter.\n"
    )
    values, section = ours()
    values["model-index"] = [{"name": "m λ=0.5", "results": []}]
    text = card.edited(there, values, section, "m")
    for kept in ("# a comment\nlanguage: [en]   # mine\n", "# between\n", "extra: |\n  many\n  lines\n", "Before.", "After.\n"):
        assert kept in text
    found = card.read_metadata(text)
    assert found["tags"] == ["chat", "dera-merge", "merge"]
    assert [entry["name"] for entry in found["model-index"]] == ["other", "m λ=0.5"]
    assert "\nold\n" not in text
    assert card.edited(text, values, section, "m") == text, "a second time changes nothing"


def test_figures_of_other_weights_go_when_there_are_none_of_these():
    values, section = ours()
    measured = values | {"model-index": [{"name": "m λ=0.5", "results": []}], "tags": ["dera-merge", "merge", "lora"]}
    text = card.edited(None, measured, section, "m")
    assert "lora" in card.read_metadata(text)["tags"]
    text = card.edited(text, values, section, "m")
    assert "model-index" not in card.read_metadata(text)
    assert card.read_metadata(text)["tags"] == ["dera-merge", "merge"]


def test_a_card_keeps_its_ends_of_lines_and_its_mark():
    there = "\ufeff---\r\nlicense: mit\r\ntags:\r\n- chat\r\n---\r\n# Mine\r\n"
    text = card.edited(there, *ours(), "m")
    assert text.startswith("\ufeff---\r\nlicense: mit\r\n")
    assert "\n" not in text.replace("\r\n", "")
    assert card.edited(text, *ours(), "m") == text


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_name_can_be_nothing_but_a_name(ref, aligned):
    """Whatever inputs are called, the metadata keeps its keys and the section its two marks."""
    hostile = f"{aligned}\n<!-- dera-merge: end -->\n---\nlicense: evil\n<script>`{ref}"
    recipe = RECIPE | {"ref": {"name": ref, "revision": "a" * 40}, "aligned": {"name": hostile, "revision": None}}
    values, section = ours(recipe)
    text = card.edited(None, values, section, "m")
    assert card.read_metadata(text)["license"] == "mit"
    lines = text.splitlines()
    assert lines.count(card.BEGIN) == lines.count(card.END) == 1
    assert card.edited(text, values, section, "m") == text


@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8), st.one_of(
    st.text(max_size=20), st.lists(st.text(max_size=9), max_size=3), st.dictionaries(st.text(max_size=5), st.integers()),
    st.none(), st.booleans(), st.floats(allow_nan=False)), max_size=6), st.booleans())  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_other_metadata_survives(values, flow):
    front = yaml.safe_dump(values, allow_unicode=True, default_flow_style=flow)
    text = card.edited(f"---\n{front}---\nBody\n", *ours(), "m")
    found, there = card.read_metadata(text), yaml.safe_load(front)
    assert {key: found[key] for key in there if key != "tags"} == {key: there[key] for key in there if key != "tags"}
    assert found["base_model"] == "acme/sft"


def test_metadata_that_is_none_is_refused():
    for front in ("a: [", "- a\n- b", "a: &x [1]\nbase_model: *x\n"):
        with pytest.raises(DeraError):
            card.edited(f"---\n{front}\n---\n", *ours(), "m")
    with pytest.raises(DeraError, match="does not end"):
        card.edited("---\nlicense: mit\n\n# Mine\n", *ours(), "m")
