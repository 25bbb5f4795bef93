"""The command line, as real processes: what people and scripts see."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import weights
from commands import run
from rich.table import Table
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, ModelPair, cli, demo
from dera_merge.cli import help, show
from dera_merge.cli.endings import Begun
from dera_merge.cli.options import Given
from dera_merge.merging.recipe import PARTIAL


def assert_one_line(done, code, *words):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()
    assert len(line) == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line[0]


@pytest.mark.core
def test_help_needs_no_torch():
    code = "import sys, dera_merge.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_long_work_says_in_a_log_file_how_far_it_is_and_short_work_says_nothing(capsys, monkeypatch):
    def log():
        with show.progress("merging") as tell:
            tell("learning", 1, 3)
            tell(None, 2, 3)
        return capsys.readouterr().err.splitlines()

    assert log() == []
    monkeypatch.setattr(show, "LOG_SECONDS", 0)
    assert log() == ["learning: 1 of 3", "merging: 2 of 3"]


def test_a_narrow_terminal_cuts_no_figure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("layer", "weights", title="What is in it", **show.PLAIN)
    table.add_row("post_attention_layernorm", "131,072")
    show.say_figures(table)
    assert "post_attention_layernorm" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.core
def test_merge_writes_one_directory_per_lambda_and_one_json_object(tmp_path):
    done = run("merge", demo.REF, demo.ALIGNED_LORA, "-l", "0:1:0.5", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [entry["lambda"] for entry in result["outputs"]] == [0, 0.5, 1]
    for entry in result["outputs"]:
        assert AutoModelForCausalLM.from_pretrained(entry["path"]).num_parameters() > 900_000
    one = run("merge", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "-o", tmp_path / "one")
    assert one.returncode == 0
    assert all((t == weights(tmp_path / "one")[n]).all() for n, t in weights(tmp_path / "out" / "lambda-0.5").items())


@pytest.mark.core
@pytest.mark.parametrize("mode", ["exact", "merged", "speculative"])
def test_generate_prints_text_or_json(mode):
    arguments = ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "--chat", "--prompt", "Tell me about the film.",
                 "--mode", mode, "--max-new-tokens", 12]  # fmt: skip
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    model = pair.merged(0.5) if mode == "merged" else pair.exact(0.5)
    words = pair.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about the film."}], add_generation_prompt=True, return_tensors="pt"
    )
    expected = model.generate(**words, max_new_tokens=12, do_sample=False)[0, words["input_ids"].shape[1] :].tolist()
    assert result["token_ids"] == expected
    assert result["text"] == pair.tokenizer.decode(expected, skip_special_tokens=True)
    assert result["exact"] == (mode != "merged")
    assert ("acceptance_rate" in result) == (mode == "speculative")
    if mode == "speculative":
        assert 0 < result["acceptance_rate"] <= 1
        assert 1 <= result["tokens_per_verification"] <= 12


def test_generate_says_on_stderr_what_speculation_brought_and_what_is_not_exact():
    arguments = ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "3", "--prompt", "The film", "--mode", "speculative",
                 "--plausibility", "0.1", "--max-new-tokens", 12]  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0
    assert "drafted tokens kept" in done.stderr
    assert "not exact DeRa" in done.stderr
    result = json.loads(run(*arguments, "--json").stdout)
    assert (result["exact"], result["plausibility"]) == (False, 0.1)
    assert result["text"] == done.stdout.rstrip("\n")


@pytest.mark.core
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_generate_loads_a_pair_quantised(load_in):
    done = run("generate", demo.REF, demo.ALIGNED_LORA, "-l", "0.5", "--prompt", "The film", "--load-in", load_in,
               "--max-new-tokens", 5, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    from dera_merge.texts.generate import quantised

    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    ids = pair.tokenizer("The film", return_tensors="pt")
    model = pair.exact(0.5, quantization_config=quantised(load_in))
    assert model.generate(**ids, max_new_tokens=5, do_sample=False)[0, -5:].tolist() == result["token_ids"]


@pytest.mark.core
def test_compare_reports_and_gates(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in demo.prompts()[:4]))
    common = ["compare", demo.REF, demo.ALIGNED_DENSE, "-l", "0.5", "--prompts", prompts, "--max-new-tokens", 8]
    passed = run(*common, "-o", tmp_path / "a", "--json", "--max-kl", 1, "--min-top1", 0.5)
    assert passed.returncode == 0, passed.stderr
    result = json.loads(passed.stdout)
    (figures,) = result["results"]
    assert {"lambda", "tokens", "kl", "kl_ci", "reverse_kl", "js", "tv", "top1", "kl_ref", "kl_aligned", "captured",
            "kl_rounding", "kl_nonlinearity"} <= figures.keys()  # fmt: skip
    assert result["gate"]["passed"] is True
    failed = run(*common, "-o", tmp_path / "b", "--json", "--max-kl", 1e-12)
    assert failed.returncode == 3
    assert json.loads(failed.stdout)["gate"] == {"passed": False, "max_kl": 1e-12, "min_top1": None, "failed": [0.5]}
    assert json.loads((tmp_path / "b" / "report.json").read_text())["results"] == json.loads(failed.stdout)["results"]


@pytest.mark.core
def test_inspect_says_what_things_are_and_how_far_apart(tmp_path):
    done = run("inspect", demo.REF, demo.ALIGNED_DENSE, "--json")
    result = json.loads(done.stdout)
    assert [model["kind"] for model in result["models"]] == ["full", "full"]
    assert result["delta"]["problem"] is None
    ref, aligned = weights(demo.REF), weights(demo.ALIGNED_DENSE)
    same = sum(int((ref[name] == aligned[name]).sum()) for name in ref) / sum(t.numel() for t in ref.values())
    assert result["delta"]["total"]["steps"]["unchanged"] == pytest.approx(same)
    delta = sum(((aligned[n].double() - ref[n].double()) ** 2).sum() for n in ref) / sum((ref[n].double() ** 2).sum() for n in ref)
    assert result["delta"]["total"]["relative"] == pytest.approx(delta.sqrt().item())
    assert "LORA r=8 adapter of ../reference" in run("inspect", demo.ALIGNED_LORA).stdout
    ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA).merge(tmp_path / "m", [0.5])
    assert "merged by dera-merge: λ=0.5" in run("inspect", tmp_path / "m").stdout


@pytest.mark.slow
def test_a_path_is_learned_measured_decoded_and_merged(tmp_path):
    pair, path = (demo.REF, demo.ALIGNED_LORA), tmp_path / "path.safetensors"
    learn = ["calibrate", *pair, "-l", "0,1", "--texts", 32, "--max-new-tokens", 16, "-o", path]
    done = run(*learn, "--prompts", demo.FOLDER / "validation.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["held_out"]["inner"]["path_weighted"] <= result["held_out"]["inner"]["line_weighted"]
    assert_one_line(run(*learn), 1, "--overwrite")
    (tmp_path / "mine.txt").write_text("not a path")
    assert_one_line(run(*learn[:-1], tmp_path / "mine.txt", "--overwrite"), 1, "mine.txt")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in demo.prompts()[:4]))
    measure = ["compare", *pair, "-l", "0.5", "--prompts", prompts, "--max-new-tokens", 12, "--path", path]
    done = run(*measure, "-o", tmp_path / "report", "--with", "none", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["path"]["sha256"] == result["sha256"]
    assert "--path" in report["command"]
    words = ["--path", path, "--max-new-tokens", 8, "--prompt", "The film", "--mode", "merged", "--json"]
    done = run("generate", *pair, "-l", "0.5", *words)
    assert done.returncode == 0, done.stderr
    opened = ModelPair.from_pretrained(*pair)
    ids = opened.tokenizer("The film", return_tensors="pt")
    expected = opened.merged(0.5, path=path).generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert json.loads(done.stdout)["token_ids"] == expected.tolist()
    done = run("merge", *pair, "-l", "0.5", "-o", tmp_path / "out", "--path", path, "--report", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "dera_merge.json").read_text())["path"]["sha256"] == result["sha256"]
    assert_one_line(run("merge", *pair, "-l", "1.5", "-o", tmp_path / "beyond", "--path", path), 1, "from 0 to 1")


BAD = {
    "no such directory": (["merge", "./none", demo.ALIGNED_LORA, "-l", "1"], 1, ["no directory ./none"]),
    "not a model": (["merge", demo.FOLDER, demo.ALIGNED_LORA, "-l", "1"], 1, ["neither config.json"]),
    "a file": (["merge", demo.FOLDER / "prompts.jsonl", demo.REF, "-l", "1"], 1, ["is a file"]),
    "shard size": (["merge", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--max-shard-size", "big"], 1, ["shard size"]),
    "device": (["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--device", "gpu9"], 1, ["gpu9"]),
    "prompts": (["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompts", "/nonexistent"], 1, ["cannot be read"]),
    "approx": (["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--approx", demo.REF], 1, ["not written by dera-merge"]),
    "huge lambda": (["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1e30", "--max-new-tokens", "2"], 1, ["no finite logits"]),
    "meta": (["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--device", "meta"], 1, ["meta"]),
    "base": (["merge", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--base", demo.ALIGNED_LORA], 1, ["is an adapter"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, kind):
    arguments, code, words = BAD[kind]
    assert_one_line(run(*arguments, "-o", tmp_path / "out", "--json"), code, *words)
    assert not (tmp_path / "out").exists()


TINY = (demo.REF, demo.ALIGNED_LORA)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", *TINY, "--prompts", "given.txt", "--reward", "nosuch"], "'nosuch' is no reward"),
        (["sweep", *TINY, "--prompts", "given.txt", "--reward", "nosuch:f"], "No module named"),
        (["sweep", *TINY, "--prompts", "given.txt", "--reward", "length", "--from-scored", "none"], "none"),
        (["sweep", *TINY, "--prompts", "empty.txt", "--reward", "length"], "holds no prompts"),
        (["compare", *TINY, "-l", "1", "--prompts", "empty.txt"], "holds no prompts"),
        (["compare", *TINY, "-l", "1", "--reward", "nosuch", "--with", "coupled"], "'nosuch' is no reward"),
        (["auto", *TINY, "--reward", "nosuch"], "'nosuch' is no reward"),
        (["auto", *TINY, "--prompts", "empty.txt"], "holds no prompts"),
        (["calibrate", *TINY, "-l", "0,1", "--prompts", "empty.txt"], "holds no prompts"),
    ],
)
def test_prompts_and_rewards_are_looked_at_before_models_are(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Given, "open", lambda given: pytest.fail("the pair was opened"))
    Path("given.txt").write_text("one\ntwo\n")
    Path("empty.txt").touch()
    with pytest.raises(DeraError, match=words):
        cli.app([*map(str, arguments), "-o", "out"], standalone_mode=False)
    assert not Path("out").exists()


@pytest.mark.parametrize("lam", ["nan", "inf", "0:1:0", "0:1:0.3", "x", "0.3333333,0.3333334", "0.5+0.5"])
def test_a_lambda_that_is_none_is_a_usage_error(tmp_path, lam):
    done = run("merge", demo.REF, demo.ALIGNED_LORA, "-l", lam, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.core
@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["merge", demo.REF, demo.ALIGNED_LORA, "-l", "1"], ["inspect"], ["merge", "--nosuch"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "0,1", "--prompt", "x"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--seed", "-1"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--temperature", "inf"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--plausibility", "0"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--load-in", "2bit"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--mode", "merged", "--load-in", "4bit"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--device", "cpu,cpu,cpu"],
                  ["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "-o", "x", "--max-kl", "nan"],
                  ["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "-o", "x", "--with", "floor,magic"],
                  ["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "-o", "x", "--reward", "a:b"],
                  ["generate", demo.REF, demo.ALIGNED_LORA, "-l", "1", "--prompt", "x", "--path", "p"],
                  ["calibrate", demo.REF, demo.ALIGNED_LORA, "-l", "0,1", "-o", "x", "--kind", "magic"],
                  ["compare", demo.REF, demo.ALIGNED_LORA, "-l", "1", "-o", "x", "--dtype", "int8"]]
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_prompt_beyond_the_context_or_of_no_tokens_is_refused():
    for prompt, words in (("word " * 400, "more than the model's 256"), ("", "the prompt is empty")):
        assert_one_line(run("generate", *TINY, "-l", "1", "--prompt", prompt), 1, words)


@pytest.mark.parametrize("config", ["[]", '{"architectures": "LlamaForCausalLM"}', "{broken", '{"a": 1, "a": 2}'])
def test_a_config_that_is_none_is_one_line(tmp_path, config):
    shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    assert_one_line(run("merge", demo.REF, tmp_path / "model", "-l", "1", "-o", tmp_path / "out"), 1, "config.json")
    assert_one_line(run("inspect", tmp_path / "model"), 1, "config.json")


@pytest.mark.parametrize("recipe", ["[]", "{}", '{"files": 3}'])
def test_a_recipe_that_is_none_is_one_line(tmp_path, recipe):
    shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "model")
    (tmp_path / "model" / "dera_merge.json").write_text(recipe)
    assert_one_line(run("inspect", tmp_path / "model"), 1, "not one that dera-merge wrote")


def test_a_report_is_not_written_into_an_input(tmp_path):
    shutil.copytree(demo.REF, tmp_path / "ref")
    done = run("compare", tmp_path / "ref", demo.ALIGNED_DENSE, "-l", "1", "-o", tmp_path / "ref" / "sub")
    assert_one_line(done, 1, "lies in an input")


def test_an_interruption_names_a_command_to_go_on_with_where_something_was_written(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    words = "dera-merge merge a b -l 1 -o c"
    go_on = f"interrupted; go on with: {words} --resume\n"
    old, new = Begun(Path("c"), at=time.time() + 60), Begun(Path("c"))
    again = Begun(Path("c"), resumes=True, at=old.at)
    for place, begun, said in (
        (None, None, "interrupted\n"), (None, new, "interrupted\n"), ("c/f", old, "interrupted\n"), ("c/f", new, go_on),
        ("c/f", again, go_on), ("c.unfinished/f", new, go_on),
    ):  # fmt: skip
        for leftover in ("c", "c.unfinished"):
            shutil.rmtree(leftover, ignore_errors=True)
        if place:
            Path(place).parent.mkdir()
            Path(place).touch()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words.split())
            patch.setattr(help.Command, "begun", begun)
            patch.setattr(help.Command, "invoke" if begun else "make_context", interrupted)
            with pytest.raises(SystemExit, match="130"):
                cli.main()
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "a", "b", "-l", "1", "-o", "c", "--new-tokens", "x"], "for '--new-tokens': 'x' is not one of"),
        (["merge", "a", "b", "-l", "1", "-o", "c", "--seed", "-1"], "for '--seed': must be 0 or more"),
        (["merge", "a", "b", "-l", "1", "-o", "c", "--seed", "one"], "for '--seed': must be a whole number"),
        (["sweep", "a", "b", "--prompts", "p", "-o", "c", "--keep", "0.9"], "for --keep: is a share of a reward"),
    ],
)
def test_what_an_option_does_not_take_is_named_plainly(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


def test_a_locale_without_our_letters_gets_their_numbers_and_json_stays_json():
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    western = {**plain, "PYTHONIOENCODING": "latin-1"}
    said = subprocess.run([sys.executable, "-m", "dera_merge", "merge", "--help"], env=western, capture_output=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert b"-l \\u03bb" in said.stdout
    code = "from dera_merge.cli import show; show.take_any_encoding(); show.print_json({'text': 'λ é 😀'})"
    told = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, timeout=60)
    assert json.loads(told.stdout) == {"text": "λ é 😀"}, told.stderr


def test_control_characters_in_names_are_escaped():
    done = run("inspect", "./no\x1b[31m\nsuch")
    assert_one_line(done, 1, "\\x1b")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_killed_merge_is_marked_as_partial_and_resumes(llama, tmp_path, number, code):
    """A 60 MB merge, killed once its first shard is there."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 64}
    ref, aligned = llama(0, **big), llama(1, **big)
    command = ["merge", str(ref), str(aligned), "-l", "0.5", "-o", str(tmp_path / "out"), "--max-shard-size", "1MB"]
    process = subprocess.Popen([sys.executable, "-m", "dera_merge", *command], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    while not list((tmp_path / "out").glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    go_on = shlex.join(["dera-merge", *command, "--resume"])
    assert said == (f"interrupted; go on with: {go_on}\n" if number != signal.SIGKILL else "")
    assert (tmp_path / "out" / PARTIAL).exists()
    assert not (tmp_path / "out" / "config.json").exists()
    resumed = run(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "whole", [0.5], max_shard_size="1MB")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert {f.name for f in (tmp_path / "whole").iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}


def test_the_demo_pair_is_small():
    assert sum(file.stat().st_size for file in demo.FOLDER.rglob("*") if file.is_file()) < 8e6


def test_the_demo_runs_on_few_prompts(tmp_path, monkeypatch):
    from dera_merge import tour as show

    few = demo.prompts()[:4]
    monkeypatch.setattr(show, "LAMS", [0.0, 0.5, 1.0, 2.0])
    monkeypatch.setattr(show, "TOKENS", 8)
    monkeypatch.setattr(demo, "prompts", lambda split="test": few)
    result = show.run(tmp_path / "demo")
    assert [sample["lambda"] for sample in result["samples"]] == [0, 0.5, 1, 2]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(result["checkpoint"]).num_parameters() > 900_000


@pytest.mark.slow
def test_the_demo_shows_texts_figures_and_a_checkpoint(tmp_path):
    done = run("demo", "-o", tmp_path / "demo", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [sample["lambda"] for sample in result["samples"]] == [0, 0.5, 1, 2]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    by_lambda = dict(zip([r["lambda"] for r in result["results"]], result["reward_exact"], strict=True))
    assert by_lambda[1] > by_lambda[0.5] > by_lambda[0]
    shutil.rmtree(tmp_path / "demo")
