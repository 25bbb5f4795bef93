"""Every private or undocumented name of another library is in one table, is there, and is missed in one line."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from builders import tiny_llama
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import dera_merge
from dera_merge import DeraError, DeraForCausalLM, DialForCausalLM
from dera_merge.decoding.caches import CACHE, PairCache, RowsCache
from dera_merge.decoding.speculation import MergedDraft
from dera_merge.models import doors
from dera_merge.models.doors import DOORS, TESTED

pytestmark = [pytest.mark.core, pytest.mark.doors]

ROOT = Path(__file__).parents[2]
PACKAGE = Path(dera_merge.__file__).parent
HERE = [door for door in DOORS if find_spec(door.library)]
OURS_OF_THEIRS = [DeraForCausalLM, DialForCausalLM, PairCache, RowsCache, MergedDraft]


@pytest.fixture(scope="module")
def specimens() -> list[object]:
    """One of everything whose attributes are asked for."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3])
    adapted = get_peft_model(tiny_llama(0), config)
    base = tiny_llama(0)
    cache = DynamicCache(config=base.config)
    base(torch.tensor([[5, 6]]), use_cache=True, **{CACHE: cache})
    parameters = get_peft_model(tiny_llama(0), LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
    found = [base, adapted, *adapted.modules(), *parameters.modules(), cache, *cache.layers]
    if find_spec("vllm"):
        from vllm.config import CompilationConfig
        from vllm.model_executor import parameter

        how = {"input_dim": 1, "output_dim": 0, "weight_loader": print}
        alone = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
        with mock.patch.multiple(parameter, **alone):  # else a parameter asks for a group of processes
            found += [CompilationConfig(), parameter.ModelWeightParameter(data=torch.zeros(2, 2), **how)]
    return found


@pytest.mark.parametrize("door", HERE, ids=lambda door: f"{door.library}:{door.name}")
def test_the_installed_libraries_have_every_name(door, specimens):
    holders = [each for each in specimens if not door.instance or isinstance(each, door.find_owner())]
    assert holders, f"no specimen has {door.owner}"
    assert door.missing(*holders) is None


def _private_names_of_others() -> dict[str, str]:
    """Underscore names that the package reads off objects and that it does not define itself, with a place of each."""
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py") if file.name != "doors.py"}
    own: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                own |= {target.id for target in targets if isinstance(target, ast.Name)}
    theirs = {"_modules", "_weight_loader"}  # which we set on objects of other libraries
    read: dict[str, str] = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
                names += [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names += [alias.name for alias in node.names]
            for name in names:
                if re.match(r"_[a-z]", name) and (name not in own or name in theirs):
                    read[name] = f"{file.relative_to(PACKAGE)}:{node.lineno}"
    return read


def test_every_private_name_that_the_package_reads_is_in_the_table():
    """The table is complete: a new `model._something` fails here until it has an entry, and a reason."""
    found = _private_names_of_others()
    assert "_attn_implementation" in found  # else nothing was looked at
    assert {name: place for name, place in found.items() if name not in {door.name for door in DOORS}} == {}


def test_every_private_method_that_the_package_overrides_is_in_the_table():
    known = {door.name for door in DOORS}
    for ours in OURS_OF_THEIRS:
        classes = [each for each in ours.__mro__ if each.__module__.startswith("dera_merge.")]
        others = [each for each in ours.__mro__ if each not in classes and each is not object]
        for name in {name for each in classes for name in vars(each) if re.match(r"_[a-z]", name)}:
            assert name in known or not any(name in vars(other) for other in others), f"{ours.__name__}.{name}"


def test_no_entry_is_without_a_user():
    """What nobody uses any more is taken out."""
    def text_of(folder: Path) -> str:
        return "".join(file.read_text() for file in folder.rglob("*.py") if file.name not in ("doors.py", "test_doors.py"))

    texts = {False: text_of(PACKAGE), True: text_of(ROOT / "tests")}
    assert [door.name for door in DOORS if not re.search(rf"\b{door.name}\b", texts[door.use == "tests"])] == []


def test_the_versions_named_are_those_that_are_allowed_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    floors = {
        need.name.replace("-", "_"): str(spec).removeprefix(">=")
        for line in [*project["dependencies"], *(line for extra in extras for line in extra)]
        for need in [Requirement(line)] for spec in need.specifier if spec.operator == ">="
    }  # fmt: skip
    text = "".join((ROOT / f"constraints{suffix}.txt").read_text() for suffix in ("", "-vllm")).replace("-cpu", "")
    pins = dict(line.split("==") for line in reversed(text.splitlines()) if "==" in line)  # the first file's count
    for library, (oldest, newest) in TESTED.items():
        assert (oldest, newest) == (floors[library], pins[library]), library


# A release to come that has renamed one of the names, or an argument


def gone(monkeypatch: pytest.MonkeyPatch, door: doors.Door) -> None:
    """Rename what `door` names, as a later release might."""
    owner = door.find_owner()
    homes = [each for each in (owner.__mro__ if inspect.isclass(owner) else [owner]) if door.name in vars(each)]
    if door.name == "__init__":
        monkeypatch.setattr(owner, "__init__", lambda self, *args, **kwargs: None)
        return
    for home in homes:
        monkeypatch.delattr(home, door.name)


CLASS_WIDE = [door for door in doors.of("exact decoding") if not door.instance]


@pytest.mark.parametrize("door", CLASS_WIDE, ids=lambda door: door.name)
def test_a_renamed_door_is_named_by_exact_decoding_in_one_line(door, monkeypatch):
    exact = DeraForCausalLM(tiny_llama(0), tiny_llama(1))
    gone(monkeypatch, door)
    for use in (
        lambda: exact.generate(torch.tensor([[5, 6]]), max_new_tokens=2),
        lambda: DeraForCausalLM(exact.ref, exact.aligned),
    ):
        with pytest.raises(DeraError) as caught:
            use()
        line = str(caught.value)
        missed = f"of {door.find_owner().__name__}.__init__" if door.name == "__init__" else door.name
        assert missed in line
        assert f"transformers {importlib.metadata.version('transformers')} does not have" in line
        assert f"tested with {TESTED['transformers'][0]} to {TESTED['transformers'][1]}" in line
        assert "\n" not in line


@pytest.mark.parametrize("argument", ["max_cache_length", "model_kwargs"])
def test_a_renamed_argument_is_named_too(argument, monkeypatch):
    exact = DeraForCausalLM(tiny_llama(0), tiny_llama(1))
    door = next(door for door in DOORS if door.name == "_prepare_cache_for_generation")
    owner = next(each for each in door.find_owner().__mro__ if door.name in vars(each))
    names = [f"{name}_2" if name == argument else name for name in door.takes]
    monkeypatch.setattr(owner, door.name, eval(f"lambda self, {', '.join(names)}: None"))
    with pytest.raises(DeraError, match=f"the argument {argument} of GenerationMixin._prepare_cache_for_generation"):
        exact.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


OF_PEFT = [door for door in doors.of("adapters") if not door.instance]


@pytest.mark.parametrize("door", OF_PEFT, ids=lambda door: door.name)
def test_a_renamed_door_of_peft_is_named_where_an_adapter_is_loaded(door, monkeypatch, llama, lora):
    base = llama(0)
    adapter = dera_merge.ModelPair.from_pretrained(base, lora(base)).aligned.adapter
    gone(monkeypatch, door)
    with pytest.raises(DeraError, match=rf"adapters needs .*{door.name}.*which peft {peft.__version__} does not have"):
        adapter.load_onto(tiny_llama(0), "cpu")


def test_the_command_line_says_it_in_one_line_with_status_1():
    code = (
        "import sys, transformers\n"
        "home = next(c for c in transformers.GenerationMixin.__mro__ if '_get_candidate_generator' in vars(c))\n"
        "home._get_generator = vars(home)['_get_candidate_generator']\n"
        "del home._get_candidate_generator\n"
        "from dera_merge import demo\n"
        "from dera_merge.cli import main\n"
        "pair = [str(demo.REF), str(demo.ALIGNED_LORA)]\n"
        "sys.argv = ['dera-merge', 'generate', *pair, '-l', '0.5', '--prompt', 'I love']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    needs = r"exact decoding needs GenerationMixin\._get_candidate_generator \(.+\)"
    assert re.fullmatch(rf"error: {needs}, which transformers .+ does not have; tested with .+\n", done.stderr)


@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
@pytest.mark.parametrize("door", list(doors.of("exact DeRa in vLLM")), ids=lambda door: door.name)
def test_a_renamed_door_of_vllm_is_named_where_the_model_is_imported(door):
    """In a process of its own, as vLLM does it; names that only instances have are looked for later, where there is one."""
    if door.instance:
        pytest.skip("only instances have it")
    modules = {each.owner.partition(":")[0] for each in doors.of("exact DeRa in vLLM")}
    code = (  # vLLM itself is imported first, for it needs some of these names too
        f"import sys, {', '.join(sorted(modules))}\ndelattr(sys.modules[{door.owner!r}], {door.name!r})\n"
        "import dera_merge.vllm.model\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    needs = rf"DeraError: exact DeRa in vLLM needs {re.escape(door.owner)}\.{door.name} \(.+\)"
    assert re.search(rf"{needs}, which vllm .+ does not have; tested with .+$", done.stderr.strip())


def test_every_module_can_be_imported_with_the_installed_versions():
    for module in pkgutil.walk_packages([str(PACKAGE)], "dera_merge."):
        needs = "vllm" if module.name.startswith("dera_merge.vllm.") else module.name.rpartition(".")[2]
        if needs != "__main__" and (needs != "lm_eval" or find_spec("lm_eval")) and needs != "vllm":
            importlib.import_module(module.name)
