"""Options in files: `--config`, and mergekit's files where they are a DeRa merge."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
import yaml
from builders import weights
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import cli, demo
from dera_merge.cli import mergekit, recipes

REF, DENSE, LORA, BRIEF = map(str, (demo.REF, demo.ALIGNED_DENSE, demo.ALIGNED_LORA, demo.ALIGNED_BRIEF))


@pytest.fixture
def recipe(tmp_path):
    def write(content) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return write


def test_a_recipe_is_the_command_and_what_is_typed_beats_it(recipe, tmp_path):
    file = recipe({
        "ref": REF, "aligned": [LORA, BRIEF], "lambda": ["0.5+0.25"], "lambda_for": "mlp=0.8+0.1", "dtype": "float32",
        "output": str(tmp_path / "file"), "seed": 3, "overwrite": False, "path": None, "json": True,
    })  # fmt: skip
    typed = run("merge", REF, LORA, "--aligned", BRIEF, "-l", "0.5+0.25", "--lambda-for", "mlp=0.8+0.1", "--seed", 3,
                "--dtype", "float32", "-o", tmp_path / "typed")  # fmt: skip
    assert typed.returncode == 0, typed.stderr
    done = run("merge", "--config", file)
    assert json.loads(done.stdout)["outputs"][0]["path"] == str(tmp_path / "file"), done.stderr
    ours, theirs = (json.loads((tmp_path / name / "dera_merge.json").read_text()) for name in ("file", "typed"))
    assert ours == theirs
    done = run("merge", "--config", file, "-l", "0+1", "-o", tmp_path / "other")
    assert [row["lambda"] for row in json.loads(done.stdout)["outputs"]] == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("command", "content", "words"),
    [
        ("merge", {"alined": "a"}, "'alined' is no option of this command; near are aligned"),
        ("demo", {"tokens": 3}, "'tokens' is no option of this command; it has json, output"),
        ("merge", {"overwrite": 1}, "overwrite is on or off: write true or false"),
        ("merge", {"ref": True}, "ref takes a text or a number, not true or false (so YAML reads yes, no"),
        ("merge", {"output": ["a", "b"]}, "output takes one value"),
        ("merge", {"lambda": {"a": 1}}, "lambda takes a text or a number, not NAME: VALUE"),
        ("merge", "- a\n- b\n", "holds no options"),
        ("merge", "a: [", "is no YAML"),
        ("merge", "!!python/object/apply:os.system ['touch /tmp/x']", "is no YAML"),
        ("merge", {"ref": "a", "aligned": "b", "lambda": 1, "output": "c", "seed": "many"}, "Invalid value for '--seed'"),
        ("merge", {"ref": ["a", "b"]}, "ref takes one value"),
        ("push", {"merge_method": "linear"}, "is a file of mergekit, which merge reads"),
        ("merge", {"config": "x"}, "'config' is no option"),
        ("merge", {"ref": "a", "aligned": "b", "output": "c", "lambda": "0.5x"}, "recipe.yaml: '0.5x' is not a number"),
        ("merge", {"alined": "a", "rank": 0, "json": 1}, "near are aligned; also: Invalid value for '--rank': must be 1 or more"),
        ("merge", {"alined": "a", "rank": 0, "json": 1}, "; also: json is on or off"),
    ],
)  # fmt: skip
def test_what_no_command_takes_is_a_usage_error_that_names_it(recipe, command, content, words):
    done = run(command, "--config", recipe(content))
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_typed_value_is_not_laid_at_the_door_of_the_file(recipe):
    done = run("merge", "a", "b", "-o", "c", "-l", "x", "--config", recipe({"lambda": 1}))
    assert done.returncode == 2
    assert "recipe.yaml" not in done.stderr


def test_a_report_records_the_options_that_held(recipe):
    from typer.main import get_command

    file = recipe({"ref": "a b", "aligned": ["c", "d"], "lambda": ["0.5+1", "1+1"], "output": "r", "overwrite": True, "seed": 5})
    words = ["--config", file, "--seed", "3", "--no-stack"]
    context = get_command(cli.app).commands["compare"].make_context("compare", words)
    assert recipes.command_line(context) == (
        "dera-merge compare 'a b' c --lambda 0.5+1 --lambda 1+1 --output r --overwrite --seed 3 --aligned d --no-stack"
    )


def test_neither_a_recorded_command_nor_a_recipe_holds_a_key(recipe, tmp_path):
    from typer.main import get_command

    address = "https://me:password@host/v1/chat/completions?key=secret#judge"
    words = ["--config", recipe({"ref": "a", "aligned": "b", "reward": [address, "tokens"], "output": "out"})]
    context = get_command(cli.app).commands["auto"].make_context("auto", words)
    written = recipes.write_recipe(context, tmp_path / "auto.yaml").read_text()
    for text in (written, recipes.command_line(context)):
        assert "https://host/v1/chat/completions?…#judge" in text
        assert "tokens" in text
        assert not any(secret in text for secret in ("password", "secret"))


def test_every_command_takes_a_config():
    from typer.main import get_command

    for name, command in get_command(cli.app).commands.items():
        assert any("--config" in parameter.opts for parameter in command.params), name


# mergekit


def entry(model, weight=None, **more):
    return {"model": model, **({} if weight is None else {"parameters": {"weight": weight}}), **more}


def linear(*weighted, **more):
    return {"merge_method": "linear", "models": [entry(*pair) for pair in weighted], **more}


def arithmetic(*weighted, base="ref", **more):
    return {"merge_method": "task_arithmetic", "base_model": base, "models": [entry(*pair) for pair in weighted], **more}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (linear(("ref", 0.25), ("dpo", 0.75)), {"ref": "ref", "aligned": "dpo", "lambda": "0.75"}),
        (linear(("ref", 1), ("dpo", 3)), {"lambda": "0.75"}),  # normalize is on
        (linear(("ref", 0.7), ("dpo", 0.3), parameters={"normalize": False}), {"lambda": "0.3"}),
        (linear(("dpo", 1.5), ("ref", -0.5), base_model="ref"), {"ref": "ref", "lambda": "1.5"}),
        (linear(("ref", 0.2), ("a", 0.5), ("b", 0.3)), {"aligned": ["a", "b"], "lambda": "0.5+0.3"}),
        (linear(("ref", 0.5), ("dpo", 0.5), dtype="bfloat16", out_dtype="float16"), {"dtype": "float16"}),
        (linear(("m", 0.5), ("m+lora", 0.5)), {"ref": "m", "aligned": "lora", "base": None}),
        (linear(("m+sft", 0.5), ("m+dpo", 0.5)), {"ref": "sft", "aligned": "dpo", "base": "m"}),
        (arithmetic(("dpo", 0.5), parameters={"lambda": 1.4}), {"ref": "ref", "aligned": "dpo", "lambda": "0.7"}),
        (arithmetic(("ref",), ("dpo", 0.5), parameters={"int8_mask": True}), {"lambda": "0.5"}),
        (arithmetic(("a", 1), ("b", 3), parameters={"normalize": True}), {"aligned": ["a", "b"], "lambda": "0.25+0.75"}),
        (arithmetic(("a",), ("b",), parameters={"weight": 0.3}), {"lambda": "0.3+0.3"}),
        (arithmetic(("dpo", [{"filter": "mlp", "value": 0.2}, {"filter": "layers.1.", "value": 0.3}, {"value": 0.5}])),
         {"lambda": "0.5", "lambda-for": ["*layers.1.*=0.3", "*mlp*=0.2"]}),
    ],
)  # fmt: skip
def test_a_mergekit_file_is_options_of_merge(content, expected):
    options = mergekit.options_of(content)
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"merge_method": "slerp", "models": []}, "merge_method slerp is no"),
        ({"merge_method": "dare_ties", "models": []}, "merge_method dare_ties is no"),
        (linear(("ref", 0.5), ("dpo", 0.5), tokenizer_source="union"), "tokenizer_source is nothing"),
        (linear(("ref", 0.5), ("dpo", 0.6), parameters={"normalize": False}), "sum to 1.1"),
        (linear(("ref", 0.5), ("dpo", 0.5), base_model="other"), "each listed once"),
        (linear(("ref", 0.5)), "a reference"),
        (linear(("ref", 0.5), ("ref", 0.5)), "each listed once"),
        (linear(("ref", 0.5), ("other+lora", 0.5)), "stands on another model than ref"),
        (linear(("ref", 0.5), ("dpo",)), "dpo has no weight"),
        (arithmetic((DENSE, [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]), base=REF), "filters, and weights that go"),
        (linear((REF, [0.5, [0.1]]), (DENSE, 0.5)), "is no number, nor a list of numbers"),
        (linear((REF, []), (DENSE, 0.5)), "is no number, nor a list of numbers"),
        (linear(("ref", [{"filter": "mlp", "value": 0.1}]), ("dpo", 0.5)), "add an entry without filter"),
        (arithmetic(("dpo", 0.5), base=None), "needs base_model"),
        (arithmetic(("dpo", 0.5), parameters={"gamma": 0.1}), "takes no gamma"),
        ({"merge_method": "linear"}, "models or slices"),
        ({"merge_method": "linear", "slices": [{"sources": [entry("a", 1, layer_range=[0, 2]), entry("b", 1, layer_range=[1, 3])]}]},
         "slices move, repeat or leave out layers"),
    ],
)  # fmt: skip
def test_a_mergekit_file_that_is_no_dera_merge_is_refused_by_name(content, words):
    with pytest.raises(ValueError, match=words):
        mergekit.options_of(content)


@given(st.lists(st.fractions(-3, 3, max_denominator=64).filter(bool), min_size=2, max_size=4), st.fractions(-2, 2))
@settings(max_examples=50)
def test_lambda_is_what_the_weights_come_to(shares, times):
    """Σ w_k·θ_k / Σ w_k and θ_0 + t·Σ w_k·Δ_k, of scalars, against θ_0 + Σ λ_k·Δ_k."""
    thetas = [Fraction(n * n + 1, 3) for n in range(len(shares))]
    names = [f"m{n}" for n in range(len(shares))]

    def merged(content):
        lams = map(float, mergekit.options_of(content)["lambda"].split("+"))
        return float(thetas[0]) + sum(lam * float(theta - thetas[0]) for lam, theta in zip(lams, thetas[1:], strict=True))

    texts = [repr(float(share)) for share in shares]
    if sum(shares):
        expected = sum(w * theta for w, theta in zip(shares, thetas, strict=True)) / sum(shares)
        ours = merged(linear(*zip(names, texts, strict=True)))
        assert ours == pytest.approx(float(expected), rel=1e-9, abs=1e-9)
    expected = thetas[0] + times * sum(w * (theta - thetas[0]) for w, theta in zip(shares[1:], thetas[1:], strict=True))
    content = arithmetic(*zip(names[1:], texts[1:], strict=True), base="m0", parameters={"lambda": float(times)})
    assert merged(content) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def test_slices_and_filters_merge_as_mergekit_does(recipe, tmp_path):
    """Tensors before the layers have the first slice's weights, those behind the last one's."""
    sources = lambda span, weight: {"sources": [entry(REF, 1 - weight, layer_range=span), entry(DENSE, weight, layer_range=span)]}  # noqa: E731
    content = {"merge_method": "linear", "slices": [sources([0, 1], 0.25), sources([1, 4], 0.75)], "dtype": "float32"}
    done = run("merge", "--config", recipe(content), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ref, aligned = weights(demo.REF), weights(demo.ALIGNED_DENSE)
    for name, tensor in weights(tmp_path / "out").items():
        lam = 0.25 if "layers.0." in name or "embed" in name else 0.75
        expected = ref[name].double() + lam * (aligned[name].double() - ref[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    content["slices"].pop()
    done = run("merge", "--config", recipe(content), "-o", tmp_path / "short")
    assert "a DeRa merge has all" in done.stderr


def of_a_list(values: list[float], t: float) -> float:
    """What mergekit 0.1.5 makes of a list of numbers (`evaluate_setting`)."""
    scaled = t * (len(values) - 1)
    low = int(scaled)
    share = scaled - low
    return (1 - share) * values[low] + share * values[min(len(values) - 1, low + 1)]


@pytest.mark.parametrize(
    ("spans", "steps"),
    [(None, {0: 0, 1: 1 / 3, 2: 2 / 3, 3: 1}), ([[0, 1], [1, 4]], {0: 1, 1: 0, 2: 1 / 2, 3: 1})],
    ids=["models", "slices"],
)
def test_a_list_of_weights_is_a_line_over_the_layers_as_mergekit_draws_it(recipe, tmp_path, spans, steps):
    """From the first layer of a slice to its last, a single one being the last; all else has the list's first number."""
    weight = {REF: [1, 0.5, 0.2], DENSE: [0, 1.5]}
    given = [entry(model, weight[model]) for model in (REF, DENSE)]
    parts = {"models": given} if spans is None else {
        "slices": [{"sources": [row | {"layer_range": span} for row in given]} for span in spans]}  # fmt: skip
    content = {"merge_method": "linear", **parts, "dtype": "float32"}
    done = run("merge", "--config", recipe(content), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ref, aligned = weights(demo.REF), weights(demo.ALIGNED_DENSE)
    seen = set()
    for name, tensor in weights(tmp_path / "out").items():
        words = name.split(".")
        t = steps[int(words[2])] if words[1] == "layers" else 0
        kept, other = (of_a_list(weight[model], t) for model in (REF, DENSE))
        lam = other / (kept + other)
        expected = ref[name].double() + lam * (aligned[name].double() - ref[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        seen.add(round(lam, 3))
    assert len(seen) == len({*steps.values()} | {0})
