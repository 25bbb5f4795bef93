"""One family of models: a tiny pair of it, and each cell of the table, against oracles without code of dera-merge.

A cell is `ok`; `refused`, with the one line that a user gets; `wrong`, with how far it is off, relative to the largest
value; `crash`, with what was raised; or `n/a`, where there is nothing to do, or where transformers or PEFT do not agree
with themselves.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from layout_checks import layouts
from oracles import (
    NEW,
    TOLERANCE,
    NotApplicable,
    Wrong,
    between,
    close,
    dora_between,
    first_line,
    greedy,
    load,
    outcome,
    same_tokens,
    turned,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import END, FIRST, PAD, UNKNOWN, Sizes, stir, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dera_merge import ModelPair, compare

ADAPTERS = ("attention", "all-linear", "experts", "DoRA")
CELLS = {
    "dense": ("merge", "live", "exact", "generate", "own", "compare"),
    "attention": ("merge", "live", "exact", "generate", "rows"),
    "all-linear": ("merge", "live", "exact", "generate"),
    "experts": ("merge", "live", "exact", "generate"),
    "DoRA": ("merge", "live", "exact", "generate"),
    "layouts": ("MTP", "mixed", "old names"),
}
NAMES = [f"{form} {what}" for form, cells in CELLS.items() for what in cells]
LAM = 0.3
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [END]}  # no row ends before the others
ATTENTION = set(
    "q_proj k_proj v_proj o_proj qkv_proj query_key_value c_attn q_attn Wqkv query key value q_lin v_lin q_b_proj "
    "kv_b_proj qkv in_proj x_proj Wq Wv query_proj project_q project_v q v c_proj qkv_linear receptance".split()
)
NO_EXPERTS = "no experts held in one tensor"
BESIDE_MAMBA = {"out_proj", "conv1d"}  # which PEFT does not take in models with Mamba layers


# One family


class Family:
    """A tiny pair, its oracles, and the cells."""

    def __init__(self, name: str, sizes: Sizes, seed: int, folder: Path) -> None:
        self.folder, self.seed = folder, seed
        model = tiny_model(name, sizes, seed)
        self.base = folder / "ref"
        self.vocabulary = {"<pad>": PAD, "<end>": END, "<unk>": UNKNOWN}
        self.vocabulary |= {f"w{n}": n for n in range(FIRST, sizes.text)}
        self.save(model, self.base)
        stir(model, seed + 1, 0.3)
        self.save(model, folder / "aligned")
        self.ref, self.aligned = load(self.base), load(folder / "aligned")
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(FIRST, sizes.text, (3, 12), generator=generator)
        mask = torch.ones_like(self.ids)
        mask[1, :5] = mask[2, :2] = 0
        self.batch = {"input_ids": self.ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
        close(self.logits(self.aligned), self.logits(model.eval()), "what transformers loads of its own file")
        apart = (self.logits(self.ref) - self.logits(self.aligned)).abs().max()
        assert apart > 100 * TOLERANCE * self.logits(self.ref).abs().max(), "the pair's models do not differ"
        self.decoding = self.own_loop()

    def own_loop(self) -> dict[str, Any] | None:
        """How the reference's own `generate` is asked to write what a loop over its logits does; None: in no way.

        Some families' caches change their tokens, or they keep a state that padding has gone through.
        """
        wanted, ahead = greedy([self.ref], [1.0], self.batch)
        for options in ({}, {"use_cache": False}):
            with contextlib.suppress(Wrong):
                same_tokens(self.ref.generate(**self.batch, **GREEDY, **options)[:, -NEW:], wanted, ahead)
                return options
        return None

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.WordLevel(self.vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
        )

    def logits(self, model: PreTrainedModel, ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return model(input_ids=self.ids if ids is None else ids, **kwargs).logits

    def generated(self, model: Any, **kwargs: Any) -> torch.Tensor:
        if self.decoding is None:
            raise NotApplicable("the model's own generate is not what a loop over its logits writes")
        return model.generate(**self.batch, **GREEDY, **self.decoding, **kwargs)[:, -NEW:]

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each cell and its check."""
        yield from self.dense()
        for form in ADAPTERS:
            yield from self.adapter(form)
        yield from layouts(self)

    def dense(self) -> Iterator[tuple[str, Callable[[], None]]]:
        pair = Lazy(lambda: ModelPair.from_pretrained(self.base, self.folder / "aligned"))
        exact = Lazy(lambda: pair().exact(LAM))

        def merge() -> None:
            (out,) = pair().merge(self.folder / "dense", [LAM], dtype="float32")
            model, expected = load(out), between(self.ref, self.aligned, LAM)
            theirs = expected.state_dict()
            for name, tensor in model.state_dict().items():
                close(tensor, theirs[name], name)
            close(self.logits(model), self.logits(expected), "logits")

        def live() -> None:
            model = pair().merged(LAM)
            close(self.logits(model), self.logits(between(self.ref, self.aligned, LAM)), "logits")
            model.set_lam(0.8)
            close(self.logits(model), self.logits(between(self.ref, self.aligned, 0.8)), "logits after set_lam")

        def forward() -> None:
            ref, aligned = self.logits(self.ref), self.logits(self.aligned)
            close(self.logits(exact()), (1 - LAM) * ref + LAM * aligned, "logits")
            lams = torch.tensor([0.0, 1.5, -0.5])
            expected = ref + lams[:, None, None] * (aligned - ref)
            close(self.logits(exact(), lam=lams.tolist()), expected, "logits of rows")

        def generate() -> None:
            tokens = self.generated(exact())
            same_tokens(tokens, *greedy([self.ref, self.aligned], [1 - LAM, LAM], self.batch))

        def own() -> None:
            # At both ends, and with the cache that the model's own call has.
            for lam, model in ((0.0, self.ref), (1.0, self.aligned)):
                theirs = model.generate(**self.batch, **GREEDY)[:, -NEW:]
                mine = exact().generate(**self.batch, **GREEDY, lam=lam)[:, -NEW:]
                same_tokens(mine, theirs, torch.ones_like(theirs, dtype=torch.float64))

        def compared() -> None:
            pair().tokenizer = self.tokenizer
            text, after = self.ids[0, :5].tolist(), self.ids[0, 5:9].tolist()
            prompt = {"prompt": words(text), "completion": words(after)}
            settings = {"dtype": "float32", "extras": (), "seed": self.seed}
            (result,) = compare(pair(), [LAM], [prompt], **settings).results
            ids = torch.tensor([text + after])
            trio = (self.ref, self.aligned, between(self.ref, self.aligned, LAM))
            ref, aligned, merged = (self.logits(model, ids)[0, 4:-1].double() for model in trio)
            log_p, log_q = ((1 - LAM) * ref + LAM * aligned).log_softmax(-1), merged.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            if not abs(result["kl"] - kl) <= 0.02 * kl + 1e-6:
                raise Wrong(f"kl is {result['kl']:.3e}, not {kl:.3e}")
            (sampled,) = compare(pair(), [LAM], [words(text)], max_new_tokens=3, **settings).results
            if not (sampled["kl"] >= -1e-6 and sampled["tokens"] > 0):
                raise Wrong(f"kl of sampled texts is {sampled['kl']}")

        work = (merge, live, forward, generate, own, compared)
        yield from zip((f"dense {what}" for what in CELLS["dense"]), work, strict=True)

    def adapter(self, form: str) -> Iterator[tuple[str, Callable[[], None]]]:
        made = Lazy(lambda: self.train(form))
        pair = Lazy(lambda: ModelPair.from_pretrained(self.base, made()[0]))
        exact = Lazy(lambda: pair().exact(LAM))
        adapted = Lazy(lambda: made()[1])

        def half() -> torch.Tensor:
            if form != "DoRA":
                with turned(adapted(), 0.5) as model:
                    return self.logits(model)
            return self.logits(dora_between(adapted(), 0.5))

        def merge() -> None:
            expected = self.logits(adapted())
            outs = pair().merge(self.folder / f"{form}-out", [0.5, 1.0], dtype="float32")
            close(self.logits(load(outs[1])), expected, "logits at λ=1")
            close(self.logits(load(outs[0])), half(), "logits at λ=0.5")

        def live() -> None:
            expected = self.logits(adapted())
            model = pair().merged(1.0)
            close(self.logits(model), expected, "logits at λ=1")
            model.set_lam(0.5)
            close(self.logits(model), half(), "logits at λ=0.5")

        def forward() -> None:
            expected = (1 - LAM) * self.logits(self.ref) + LAM * self.logits(adapted())
            close(self.logits(exact()), expected, "logits")

        def generate() -> None:
            shares = greedy([self.ref, adapted()], [1 - LAM, LAM], self.batch)
            same_tokens(self.generated(exact()), *shares)

        def rows() -> None:
            lams = [0.5, 1.0, 1.5]
            dial = pair().dial()
            logits = self.logits(dial, lam=lams)
            for row, lam in enumerate(lams):
                with turned(adapted(), lam) as model:
                    close(logits[row], self.logits(model)[row], f"logits of row {row + 1}")
            tokens = self.generated(dial, lam=lams)
            for row, lam in enumerate(lams):
                with turned(adapted(), lam) as model:
                    wanted, ahead = greedy([model], [1.0], self.batch)
                same_tokens(tokens[row : row + 1], wanted[row : row + 1], ahead[row : row + 1])

        for what, work in zip(CELLS[form], (merge, live, forward, generate, rows), strict=False):
            yield f"{form} {what}", work

    def train(self, form: str) -> tuple[Path, PreTrainedModel]:
        """An adapter with random weights, and the model with PEFT's layers of it, unmerged, from the file."""
        options = self.targets(form)
        torch.manual_seed(self.seed + 2)
        try:
            try:
                model = self.adapted(**options)
            except ValueError as error:
                if form != "all-linear" or "incompatible with Mamba" not in str(error):
                    raise
                model = self.adapted(target_modules=sorted(self.linear() - BESIDE_MAMBA))
        except Exception as error:
            raise NotApplicable(f"PEFT: {first_line(error)}") from None
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        folder = self.folder / form
        try:
            model.save_pretrained(folder, save_embedding_layers=False)
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.ref), folder).get_base_model().eval()
            close(self.logits(loaded), self.logits(model.get_base_model().eval()), "PEFT's own file")
        except Exception as error:
            raise NotApplicable(f"PEFT does not load its own file: {first_line(error)}") from None
        if (self.logits(loaded) - self.logits(self.ref)).abs().max() < 10 * TOLERANCE:
            raise NotApplicable("the adapter changes nothing of a text")
        return folder, loaded

    def adapted(self, **options: Any) -> PeftModel:
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        return get_peft_model(copy.deepcopy(self.ref), config)

    def linear(self) -> set[str]:
        """The last names of all linear layers but the head."""
        kinds = torch.nn.Linear | transformers.pytorch_utils.Conv1D
        head = self.ref.get_output_embeddings()
        return {
            path.rpartition(".")[2]
            for path, module in self.ref.named_modules()
            if isinstance(module, kinds) and module is not head
        }

    def targets(self, form: str) -> dict[str, Any]:
        if form == "all-linear":
            return {"target_modules": "all-linear"}
        if form == "experts":
            found = {
                f"experts.{name}"
                for path, module in self.ref.named_modules()
                if path.endswith("experts")
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.ndim == 3
            }
            if not found:
                raise NotApplicable(NO_EXPERTS)
            return {"target_modules": [], "target_parameters": sorted(found)}
        chosen = sorted(self.linear() & ATTENTION) or sorted(self.linear() - BESIDE_MAMBA)[:1]
        if not chosen:
            raise NotApplicable("no linear layers")
        return {"target_modules": chosen, "use_dora": form == "DoRA"}


class Lazy:
    """A value that is made when it is first asked for; what that raised is raised again."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        if not hasattr(self, "value"):
            try:
                self.value: Any = self.make()
            except Exception as error:
                self.value = error
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{n}" for n in ids)


@torch.no_grad()
def check(name: str, sizes: Sizes, seed: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Go through the cells of a family; `say` gets each as it is known, `{"cell", "state", "why"}`, and what it is."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = tiny_model(name, sizes, seed)
            if model.config.is_encoder_decoder:
                return refusal(model, Path(scratch), say)
            family = Family(name, sizes, seed, Path(scratch))
        except Exception as error:
            return say({"unbuilt": f"{type(error).__name__}: {first_line(error)}"})
        parameters = sum(parameter.numel() for parameter in family.ref.parameters())
        say({"class": type(family.ref).__name__, "parameters": parameters, "decoding": family.decoding})
        for cell, work in family.checks():
            say({"cell": cell, **outcome(work)})


def refusal(model: PreTrainedModel, folder: Path, say: Callable[[dict[str, Any]], None]) -> None:
    """An encoder-decoder: one line, and nothing written."""
    model.save_pretrained(folder / "base")
    found = outcome(lambda: ModelPair.from_pretrained(folder / "base", folder / "base").merge(folder / "out", [LAM]))
    say({"class": type(model).__name__})
    say({"cell": "dense merge", **(found if found["state"] != "ok" else {"state": "wrong", "why": "is not refused"})})
