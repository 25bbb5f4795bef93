"""Benchmarks at every λ: lm-eval itself, run on exact DeRa and on a merge at one λ after another, is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import DeraError, ModelPair, bench, cli, demo
from dera_merge.measuring.continuations import greedy_between
from dera_merge.statistics.paired import resampled, resampled_ratios, surely_above, unbeaten

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [
    ("The opening scene is", [" dull", " delightful", " long"], 1),
    ("In my view, the acting is", [" tedious", " wonderful"], 1),
    ("The hotel has", [" six floors and a lift", " a lovely view"], 1),
    ("I would not", [" go again", " miss it", " say so"], 0),
    ("We stayed there for", [" six nights", " a delightful week"], 0),
    ("The porter was", [" more friendly than I had expected", " rude", " late"], 0),
]
STORIES = ["We stayed there for six nights.", "The porter was more friendly than I had expected.", "I love it. " * 90]
TASK = "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
CHOICE = (
    "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: label\ntarget_delimiter: ''\n"
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
)
YAMLS = {
    "praise": CHOICE,
    "uneven": CHOICE + "  - metric: brier_score\n",
    "praise_shots": CHOICE + "  - metric: brier_score\nnum_fewshot: 2\nfewshot_config:\n  sampler: first_n\n",
    "last_word": (
        "output_type: loglikelihood\ndoc_to_text: start\ndoc_to_target: end\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n  - metric: acc\n"
    ),
    "stories": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: page\nmetric_list:\n"
        "  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    ),
    "goes_on": (
        "output_type: generate_until\ndoc_to_text: start\ndoc_to_target: end\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 6\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    ),
}
EXACT, MERGED = (0.3, 1.0, 2.0), 1.5
NAMES = ["both", "last_word", "stories", "goes_on"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of task files over local data, and a group of two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    ends = [" six nights.", " friendly", " delightful", " a"]
    rows = {
        "praise": [{"question": q, "choices": c, "label": n} for q, c, n in QUESTIONS],
        "last_word": [{"start": "I love", "end": end} for end in ends],
        "stories": [{"page": page} for page in STORIES],
    }
    rows |= {"praise_shots": [row | {"choices": row["choices"][:2]} for row in rows["praise"]], "goes_on": rows["last_word"], "uneven": rows["praise"]}
    for name, text in YAMLS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[name])))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + text)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [praise, praise_shots]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    return folder


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)


@pytest.fixture(scope="module")
def result(pair, tasks):
    return bench(pair, NAMES, [0.0, 0.3, 0.75, 1.0, 2.0], merged=[MERGED], include_path=tasks)


def by_the_harness(model, pair, tasks: Path) -> dict[str, dict[str, float]]:
    """lm-eval's own results of a model of transformers."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=NAMES, task_manager=manager, bootstrap_iters=0)["results"]


@pytest.mark.parametrize(("mode", "lam"), [*(("exact", lam) for lam in EXACT), ("merged", MERGED)])
def test_scores_are_those_of_the_harness_on_that_model(result, pair, tasks, mode, lam):
    """Accuracies (LAMBADA's too, which ask what greedy decoding writes), perplexities over windows, groups, and texts."""
    theirs = by_the_harness(pair.exact(lam) if mode == "exact" else pair.merged(lam), pair, tasks)
    compared = 0
    for task in result.tasks:
        for metric in task["metrics"]:
            if task["task"] == "goes_on" and (mode, lam) not in [("exact", 1.0), ("merged", MERGED)]:
                continue  # was not generated there
            (row,) = [row for row in metric[mode] if row["lambda"] == lam]
            assert row["value"] == pytest.approx(theirs[task["task"]][f"{metric['metric']},none"], rel=1e-4), (task, metric)
            compared += 1
    assert compared >= 10
    assert len({task["task"] for task in result.tasks}) == 6


def test_a_page_says_where_a_lambda_is_better_and_which_none_beats(result, tmp_path):
    folder = result.save(tmp_path)
    content = json.loads((folder / "bench.json").read_text())
    html = (folder / "bench.html").read_text()
    assert content["pareto"]
    assert "no λ is better in one of the 4 tasks" in html
    assert html.count("<svg") == 4  # a chart for each but the two that are part of a group
    assert "praise_shots" in html
    assert "praise_shots" in (folder / "bench.md").read_text()
    assert {task["part_of"] for task in content["tasks"]} == {None, "both"}


def test_what_was_read_is_not_read_again(pair, tasks, tmp_path, monkeypatch):
    from dera_merge.choosing import bench as module

    monkeypatch.setattr(module, "BLOCK_TOKENS", 60)
    read, reading = [], module.trace_at_once
    monkeypatch.setattr(module, "trace_at_once", lambda model, texts: read.append(len(texts)) or reading(model, texts))
    how = dict(lams=[0.5, 2.0], merged=[2.0], include_path=tasks, out=tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("reading, merged") and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(pair, ["praise"], **how, progress=stop)
    before = len(read)
    with pytest.raises(DeraError, match="--resume goes on"):
        bench(pair, ["praise"], **how)
    resumed = bench(pair, ["praise"], **how, resume=True)
    assert 0 < len(read) - before < before / 2
    assert resumed.to_dict() == bench(pair, ["praise"], **{**how, "out": None}).to_dict()
    resumed.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.html", "bench.json", "bench.md"]


def test_a_metric_that_fails_in_the_harness_is_named(pair, tasks):
    """Its Brier score takes items with as many choices each."""
    with pytest.raises(DeraError, match="the task uneven cannot make its brier_score of its items: ValueError"):
        bench(pair, ["uneven"], [0.0, 1.0], merged=[], include_path=tasks, limit=3)


def test_the_command_line_benches(tasks, tmp_path, capsys):
    words = ["bench", demo.REF, demo.ALIGNED_LORA, "--include-path", tasks, "-o", tmp_path, "--device", "cpu"]
    words += ["--tasks", "praise,last_word", "-l", "0,1,2", "--merged", "none", "--limit", "3"]
    cli.app([*map(str, words)], standalone_mode=False)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [(task["task"], task["items"]) for task in content["tasks"]] == [("praise", 3), ("last_word", 3)]
    assert [row["lambda"] for row in content["tasks"][0]["metrics"][0]["exact"]] == [0.0, 1.0, 2.0]
    assert content["tasks"][0]["metrics"][0]["merged"] == []
    assert "no λ is better in one of the 2 tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unknown_task_is_named_with_its_likes_among_the_harness_own(pair, tasks):
    with pytest.raises(DeraError, match="lm-eval knows no task prais; did you mean .*praise"):
        bench(pair, ["prais"], include_path=tasks)


def test_the_harness_knows_dera_as_a_model(pair):
    """What `lm_eval --model dera --model_args …` makes, as its entry point is declared."""
    import tomllib

    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["dera"].partition(":")
    __import__(module)
    assert get_model("dera").__name__ == name
    requests = [Instance("loglikelihood", {}, ("I love", end), 0) for end in (" it", " six nights")]
    device = "cpu" if torch.cuda.is_available() else "cuda:0"  # as lm-eval's command line says where nothing is said
    models = {"lam=0.5": pair.exact(0.5), "lam=0.5,mode=merged": pair.merged(0.5)}
    for arguments, model in models.items():
        ours = get_model("dera").create_from_arg_string(
            f"ref={demo.REF},aligned={demo.ALIGNED_LORA},{arguments}", {"batch_size": 2, "device": device}
        )
        assert ours.loglikelihood(requests, disable_tqdm=True) == HFLM(
            pretrained=model, tokenizer=pair.tokenizer, batch_size=2
        ).loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(DeraError, match="lam=much"):
        get_model("dera").create_from_arg_string(f"ref={demo.REF},aligned={demo.ALIGNED_LORA},lam=much")


# Numbers


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 3, 13]))
def test_a_token_is_greedys_between_two_lambdas_and_nowhere_else(seed, bits):
    """Against the argmax of the mixed logits, ties included: logits of few bits tie, and their mixtures are exact."""
    draw = np.random.default_rng(seed)
    ref, aligned = np.ldexp(np.ldexp(draw.standard_normal((2, 6, 9)), bits).round(), -bits)
    token_ids = draw.integers(9, size=6)
    low, high = greedy_between(*map(torch.tensor, (ref, aligned, token_ids)))
    for lam in (-1.5, -0.25, 0.0, 0.125, 0.5, 1.0, 1.75, 4.0):
        mixed = (1 - lam) * ref + lam * aligned
        inside = (low.numpy() <= lam) & (lam <= high.numpy())
        assert (inside == (mixed[range(6), token_ids] == mixed.max(1))).all()


def test_resampled_ratios_vary_as_they_should_and_share_their_items():
    draw = np.random.default_rng(0)
    values = (draw.random((400, 2)) < [0.3, 0.6]).astype(float)
    values = np.column_stack([values, values[:, 0]])
    draws = resampled_ratios(values, np.ones(400))
    expected = np.sqrt(values.mean(0) * (1 - values.mean(0)) / 400)
    assert draws.std(0) == pytest.approx(expected, rel=0.07)
    assert (draws[:, 0] == draws[:, 2]).all()
    slow = resampled(400, lambda at: values[at].mean(0))
    assert slow.std(0) == pytest.approx(expected, rel=0.2)


def test_of_many_lambdas_that_are_all_alike_few_runs_find_a_better_one():
    """33 λ that gain nothing, 100 runs: 5 % would find one; by intervals of their own, most would."""
    draw = np.random.default_rng(0)
    found = 0
    for seed in range(100):
        values = draw.standard_normal((200, 33, 1))
        draws = resampled_ratios(values[..., 0], np.ones(200), seed)[..., None]
        found += surely_above(values.mean(0), draws).any()
    assert found <= 12
    values[:, 7] += 0.5
    draws = resampled_ratios(values[..., 0], np.ones(200))[..., None]
    assert surely_above(values.mean(0), draws).nonzero()[0].tolist() == [7]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_none_beats_what_is_unbeaten(points):
    scores = np.array(points)
    beaten = [any((b >= a).all() and (b > a).any() for b in scores) for a in scores]
    assert unbeaten(scores).tolist() == [not each for each in beaten]
