"""The model card of a published merge: what dera-merge says in it, and how that goes into a card that is there already.

A card is edited, not written anew: only the metadata that is ours and the section between our two marks change, every
other byte stays. All that comes from inputs (names, revisions) is put where it cannot act as YAML, Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import DeraError
from ..measuring.report import Report
from ..merging.parts import output_name, rules_of
from ..models.source import PROCESSOR_FILES, VOCABULARY_FILES
from ..pages.fidelity import COLUMNS, LEGEND, cells, sentences

BEGIN, END = "<!-- dera-merge: begin -->", "<!-- dera-merge: end -->"
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(rf"^{re.escape(BEGIN)}[ \t]*$.*?^{re.escape(END)}[ \t]*$", re.DOTALL | re.MULTILINE)
METRICS = {
    "kl": "KL(exact DeRa‖merged), nats per token", "tv": "total variation", "top1": "same most likely token",
    "captured": "captured shift",
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """A model that a merge was made of.

    Attributes:
        name: as it was typed when merging, a Hub id without its revision.
        revision: the commit if it came from the Hub, else None.
        role: `"reference"`, `"aligned"` or `"base"`.
    """

    name: str
    revision: str | None
    role: str

    @property
    def on_hub(self) -> bool:
        """Whether it came from the Hub: what is no id is not made a link or code, whoever wrote `dera_merge.json`."""
        commit = re.fullmatch(r"[0-9a-f]{40}", str(self.revision))
        return bool(commit and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", self.name, re.ASCII))

    @property
    def typed(self) -> str:
        """What to type to get this very model."""
        return f"{self.name}@{self.revision}" if self.on_hub else self.name


def parents(recipe: dict[str, Any]) -> list[Parent]:
    """The models that `dera_merge.json` names: reference, aligned, and the base of adapters where it is another."""
    named = []
    for role, side in (("reference", recipe["ref"]), *(("aligned", side) for side in _aligned(recipe))):
        named += [_parent(side, role), *_base(side)]
    distinct: dict[tuple[str, str | None], Parent] = {}
    for parent in sorted(named, key=lambda parent: parent.role == "base"):
        distinct.setdefault((parent.name, parent.revision), parent)
    return list(distinct.values())


def _aligned(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The aligned sides that a recipe names."""
    return [recipe["aligned"], *recipe.get("others", ())]


def _parent(side: dict[str, Any], role: str) -> Parent:
    return Parent(str(side.get("name")).partition("@")[0], side.get("revision"), role)


def _base(side: dict[str, Any]) -> list[Parent]:
    """The base of a side's adapter; none where it is a full model."""
    return [_parent({"name": side["base"], "revision": side.get("base_revision")}, "base")] if side.get("base") else []


def metadata(recipe: dict[str, Any], report: Report | None, repo_id: str, inherited: dict[str, Any]) -> dict[str, Any]:
    """The card's metadata that is ours.

    Args:
        recipe: `dera_merge.json`.
        report: a `Report` of these weights, or None.
        inherited: licence and language of the parents.
    """
    adapter = recipe.get("format") == "adapter"
    ids = [parent.name for parent in parents(recipe) if parent.on_hub]
    if adapter:  # what the Hub shows it as an adapter of comes first
        ids.sort(key=lambda name: name != base_of(recipe).name)
    values: dict[str, Any] = {}
    if ids:
        values |= {
            "base_model": ids if len(ids) > 1 else ids[0],
            "base_model_relation": "adapter" if adapter else "merge",
        }
    values |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    values |= inherited | {"tags": ["dera-merge", "merge", *(["lora"] if adapter else [])]}
    if report is not None:
        from huggingface_hub import EvalResult, ModelCardData

        settings, result = report.settings, report.at(recipe["lambda"])
        name = f"{repo_id.partition('/')[2] or repo_id} λ={recipe['lambda']:g}"
        texts = str(settings.get("texts", "")).removesuffix(" at each λ")
        data = f"{settings.get('prompts')} prompts, {texts}"
        figures = [
            EvalResult(
                task_type="text-generation", dataset_type="dera-merge", dataset_name=data, metric_type=key,
                metric_name=label, metric_value=float(f"{result[key]:.4g}"),
            )
            for key, label in METRICS.items() if result.get(key) is not None
        ]  # fmt: skip
        if figures:
            values["model-index"] = ModelCardData(model_name=name, eval_results=figures).to_dict()["model-index"]
    return values


def base_of(recipe: dict[str, Any]) -> Parent:
    """The model that an adapter of this recipe is put on."""
    return next(iter(_base(recipe["ref"])), None) or _parent(recipe["ref"], "reference")


def section(
    recipe: dict[str, Any], report: Report | None, repo_id: str, revision: str,
    siblings: Sequence[tuple[str, float]] = (), alone: bool = False, plot: str | None = None, sees: bool = False,
) -> str:  # fmt: skip
    """Our section of the card of one λ, marks included.

    Args:
        recipe: `dera_merge.json`.
        report: a `Report` of these weights, or None.
        repo_id, revision: where the weights will be.
        siblings: branch and λ of all that is published together.
        alone: the card is of the repository, and has no weights beside it; `recipe` and `report` are of one of the λ.
        plot: the report's plot, a file beside the card.
        sees: the model is of a class that reads images too.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dera_merge.pages", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"code": code, "fenced": fenced, "inert": inert}
    lam, adapter = recipe["lambda"], recipe.get("format") == "adapter"
    files = recipe.get("files") or {}
    processes = not {*PROCESSOR_FILES}.isdisjoint(files)
    rows = result = None
    if report is not None:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(list(map(inert, cells(row))) for row in report.results)]
        result = report.at(lam)
    revision = siblings[0][0] if alone else revision
    at, option = (f', revision="{revision}"', f" --revision {revision}") if revision != "main" else ("", "")
    base = base_of(recipe)
    text = environment.get_template("card.md").render(
        lam=f"{lam:g}", adapter=adapter, parents=parents(recipe), base=base,
        of_base=f'"{base.name}", revision="{base.revision}"' if base.on_hub else '"BASE"',
        brings_tokenizer=not {*VOCABULARY_FILES}.isdisjoint(files), repo_id=repo_id, at=at,
        option=option, command=command(recipe), recipe=recipe, rules=rules_of(recipe.get("path")),
        siblings=siblings, alone=alone, plot=plot, result=result,
        legend=LEGEND, table=rows and "\n".join(f"| {' | '.join(row)} |" for row in rows),
        said=result and sentences(result),
        loader="AutoModelForImageTextToText" if sees or (adapter and processes) else "AutoModelForCausalLM",
        reader="AutoProcessor" if processes else "AutoTokenizer",
    )  # fmt: skip
    return f"{BEGIN}\n{text.strip()}\n{END}"


def command(recipe: dict[str, Any]) -> str:
    """The command that makes these weights again, with the revisions that were read."""
    import shlex

    ref, aligned, *others = (_parent(side, "").typed for side in (recipe["ref"], *_aligned(recipe)))
    words = ["dera-merge", "merge", ref, aligned, *(word for other in others for word in ("--aligned", other))]
    words += ["-l", f"{recipe['lambda']:g}"]
    if recipe.get("format") == "adapter":
        words += ["--format", "adapter"]
        words += ["--rank", str(recipe["cut_to_rank"])] if recipe.get("cut_to_rank") else []
        words += ["--extract-rank", str(recipe["extract_rank"])] if recipe.get("extract_rank") else []
    words += [word for key in ("dtype", "rounding", "seed") for word in (f"--{key}", str(recipe.get(key)))]
    words += ["--base-quantization", str(recipe["base_quantization"])] if recipe.get("base_quantization") else []
    words += ["--new-tokens", "aligned"] if recipe.get("new_tokens") == "aligned" else []
    words += ["--stack"] if recipe.get("stack") else []
    rules = rules_of(path := recipe.get("path"))
    words += [word for rule in rules for word in ("--lambda-for", rule)]
    words += ["--path", "path.safetensors"] if isinstance(path, dict) and not rules else []
    words += ["--allow-nonfinite"] if recipe.get("allow_nonfinite") else []
    return shlex.join([*words, "-o", output_name(recipe["lambda"], path)])


def edited(card: str | None, values: dict[str, Any], ours: str, title: str, replace: Sequence[str] = ()) -> str:
    """A card with our metadata and our section in it.

    Args:
        card: the card that is there; None makes a new one.
        values: our metadata. `tags` are added to those that are there, and `model-index` entries replace those of the
            same name; `base_model` and `base_model_relation` replace what is there; any other key stays if it is there.
        ours: the section, marks included.
        title: of a new card: a repository's name, which Hub ids keep to letters, digits, '-', '_' and '.'.
        replace: further keys whose value is to be replaced.

    Raises:
        DeraError: the card's metadata cannot be read.
    """
    if card is None:
        return f"---\n{_dump(values)}---\n\n# {title}\n\n{ours}\n"
    if card.startswith("\ufeff"):
        return "\ufeff" + edited(card[1:], values, ours, title, replace)
    if "\r\n" in card and "\n" not in card.replace("\r\n", ""):  # a card with Windows' ends of lines keeps them
        return edited(card.replace("\r\n", "\n"), values, ours, title, replace).replace("\n", "\r\n")
    front = _FRONT.match(card)
    block, rest = (front[1], card[front.end() :]) if front else ("", card)
    present = read_metadata(card)
    wanted: dict[str, Any] = {}
    if isinstance(present.get("model-index"), list):  # figures of ours go, whatever they were measured on
        prefix = f"{title} λ="
        others = [
            e for e in present["model-index"] if not (isinstance(e, dict) and str(e.get("name")).startswith(prefix))
        ]
        values = values | {"model-index": [*others, *values.get("model-index", [])] or None}
    for key, value in values.items():
        if key == "tags":
            kept = present.get(key) or []
            kept = [str(tag) for tag in (kept if isinstance(kept, list) else [kept])]
            if "dera-merge" in kept and "lora" not in value:  # it was an adapter before
                kept = [tag for tag in kept if tag != "lora"]
            value = list(dict.fromkeys([*kept, *value]))
        elif key == "model-index":
            pass
        elif key in present and key not in (*replace, "base_model", "base_model_relation"):
            continue
        if present.get(key) != value:
            wanted[key] = value
    block = _with_keys(block, wanted)
    body = _SECTION.sub(lambda _: ours, rest, count=1) if _SECTION.search(rest) else f"{rest.rstrip()}\n\n{ours}\n"
    return f"---\n{block}---\n{body}" if block.strip() else body


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata of a card. Raises DeraError where it is no YAML mapping."""
    front = _FRONT.match(card)
    if front is None and re.match(r"\ufeff?---[ \t]*\r?\n", card):
        raise DeraError("the metadata of the card does not end: its second --- is missing; mend it first")
    try:
        values = yaml.safe_load(front[1]) if front else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeraError(f"the metadata of the card cannot be read ({reason}); mend it first") from error
    if not isinstance(values or {}, dict):
        raise DeraError("the metadata of the card is no mapping; mend it first")
    return values or {}


def _with_keys(block: str, values: dict[str, Any]) -> str:
    """A YAML mapping as text with these keys set, or left out (None); everything else, comments too, stays as it is."""
    root = yaml.compose(block, Loader=yaml.SafeLoader) if block.strip() else None
    if root is not None and (root.flow_style or root.start_mark.column):
        both = yaml.safe_load(block) | values
        return _dump({key: value for key, value in both.items() if value is not None or key not in values})
    spans = {key.value: (key.start_mark.index, _end(value)) for key, value in root.value} if root is not None else {}
    if block and not block.endswith("\n"):
        block += "\n"
    for key, value in sorted(values.items(), key=lambda item: -spans.get(item[0], (0, 0))[0]):
        if key in spans:
            start, end = spans[key]
            if end < start:
                raise DeraError(f"the card's {key} is a YAML alias; write it out first")
            block = f"{block[:start]}{_dump({key: value}).rstrip() if value is not None else ''}{block[end:]}"
    return block + "".join(_dump({key: v}) for key, v in values.items() if key not in spans and v is not None)


def _end(node: yaml.Node) -> int:
    """Where a node's text ends: a block collection's own mark lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        text = node.end_mark.buffer[: node.end_mark.index] if node.end_mark.buffer else ""
        return len(text.rstrip()) if text else node.end_mark.index
    return node.end_mark.index


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) if values else ""


def inert(text: str) -> str:
    """A sentence of ours around figures from a file, without what could act as HTML, a link or a table's cell."""
    return re.sub(r"([<\[\]`|])", r"\\\1", " ".join(str(text).split()))


def code(text: str) -> str:
    """Text from elsewhere as a code span: one line, between more backticks than it has in a row."""
    line = _one_line(text).replace("|", "¦")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{gap}{line}{gap}{fence}" if line else "` `"


def fenced(text: str) -> str:
    """A command of ours with text from elsewhere in it, as a block of code of one line."""
    line = _one_line(text)
    fence = "`" * max(3, max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence}bash\n{line}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
