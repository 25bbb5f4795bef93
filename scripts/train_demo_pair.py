#!/usr/bin/env python3
"""Train the demo pair that ships inside the package: a small reference model and two DPO runs on it.

    python scripts/train_demo_pair.py                  # writes dera_merge/demo/, about six minutes on two cores
    python scripts/train_demo_pair.py -o DIR --objective ipo --beta 0.05

The reference is a Llama of one million parameters, trained from scratch on reviews that a small grammar writes, then
stored as bfloat16. Both DPO runs start from exactly what was stored and learn from its own samples, ranked by
`dera_merge.demo.reward`. The LoRA run shifts it strongly. The dense run moves most weights by less than they round by,
as full fine-tuning of large models does. The same options give the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpo
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dera_merge import demo

TEST, VALIDATION, TRAIN = 32, 64, 768  # prompts
CONTEXT, ANSWER = 256, 128  # tokens
TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

# -- The grammar ------------------------------------------------------------------------------------------------------

# Adjectives that fit a kind of aspect. All of them, and no other words of sentiment, are in the lexicons of the reward.
GENERAL = (
    "excellent wonderful superb delightful impressive lovely",
    "awful dreadful disappointing terrible mediocre poor",
)
FITTING = {
    "story": ("gripping clever touching witty memorable", "dull predictable tedious confusing shallow"),
    "craft": ("vivid graceful confident tender memorable", "clumsy lifeless wooden careless dull"),
    "place": ("spotless cosy bright comfortable peaceful", "shabby dirty cramped gloomy noisy"),
    "people": ("friendly attentive helpful cheerful patient", "rude slow careless indifferent impatient"),
    "food": ("delicious fresh generous tasty memorable", "bland stale greasy overpriced mediocre"),
    "part": ("reliable sturdy practical precise handy", "flimsy unreliable rickety fragile awkward"),
}
VERBS = ("loved enjoyed adored admired", "hated disliked regretted")
FEELINGS = ("pleased charmed", "annoyed bored")
ADVERBS = ("happily", "sadly unfortunately")


@dataclass(frozen=True)
class Kind:
    """A kind of thing to review. In its templates `{it}` is the name, `{thing}` the kind; the rest are `SLOTS`."""

    names: list[str]
    prompt: str  # how a user names it
    name: str  # how a review names it
    past: bool
    aspects: dict[str, str]  # aspect → key of FITTING
    openings: list[str]
    facts: list[str]
    again: str


SLOTS = {
    "when": [
        "last week", "on a rainy Sunday", "on Friday evening", "two days ago", "in early spring",
        "during a long weekend",
    ],
    "who": ["my sister", "my neighbour", "an old friend", "my father", "a colleague", "my cousin"],
    "crowd": [
        "families", "students", "commuters", "older couples", "busy people", "curious teenagers", "weekend travellers",
    ],
    "few": ["two", "three", "four", "five", "six"],
    "about": [
        "a lighthouse keeper and her son", "two brothers who share a farm", "a young teacher in a mountain village",
        "a retired detective and his dog", "a violinist who loses her hearing", "three friends on a long train journey",
        "a baker who inherits a castle", "a sailor who returns after ten years", "a family that moves to the desert",
        "a map maker in the last century", "twins who were raised apart", "a nurse on a distant island",
    ],
    "where": [
        "the old harbour", "the market square", "the railway station", "the river", "the botanical garden",
        "the cathedral",
    ],
    "aside": [
        "in my view", "to be honest", "as far as I can tell", "for what it costs", "if you ask me", "on the whole",
    ],
    "room": ["the kitchen", "the office", "the garden", "the living room", "the workshop"],
    "colour": ["black", "white", "red", "grey", "dark blue", "green"],
}  # fmt: skip


def titles() -> list[str]:
    """Titles of films and novels."""
    first = (
        "Silent Golden Broken Distant Hidden Burning Frozen Endless "
        "Crimson Hollow Wandering Secret Painted Northern Last"
    )
    second = (
        "Harbor River Orchard Mountain Letter Garden Winter Bridge Lantern Island Mirror Station Valley Crown Shadow"
    )
    return [f"The {a} {b}" for a in first.split() for b in second.split()]


def surnames(pattern: str) -> list[str]:
    """Names of hotels and restaurants."""
    first = "Mar Bel Hol Ash Win Lin Cor Dal Fen Gar Har Kel Nor Os Pem Ros Sel Thorn Wes Yar"
    second = "low ford mont wick bury ton dale den more well"
    return [pattern.format(a + b) for a in first.split() for b in second.split()]


def brands() -> list[str]:
    """Names of devices."""
    first = "Nor Lu Vel Zan Kor Tri Mo Al Bri Cas Del Ev Fi Gal Hex"
    second = "vex mera tron dix lia para ston vio quo zen"
    return [a + b for a in first.split() for b in second.split()]


def device(thing: str, parts: str, facts: Sequence[str]) -> Kind:
    openings = [
        "I bought {it} {when}.",
        "I have used {it} for {few} months now.",
        "{who} gave me {it} {when}.",
        "{it} replaced a {thing} that was {few} years old.",
        "We keep {it} in {room}.",
    ]
    shared = [
        f"The {thing} comes in {{colour}} and in {{colour}}.",
        f"The {thing} arrived after {{few}} days.",
        f"It stands in {{room}} next to an older {thing}.",
    ]
    name = f"the {{name}} {thing}"
    aspects = dict.fromkeys(parts.split(", "), "part")
    return Kind(brands(), name, name, False, aspects, openings, [*facts, *shared], "buy it again")


KINDS = {
    "film": Kind(
        titles(), "the film '{name}'", "'{name}'", False,
        {"plot": "story", "ending": "story", "dialogue": "story", "acting": "craft", "camera work": "craft",
         "soundtrack": "craft", "opening scene": "story", "supporting cast": "craft"},
        ["{it} is a film about {about}.", "I watched {it} with {who} {when}.", "{it} tells the story of {about}.",
         "The film {it} follows {about}.", "We saw {it} at the cinema {when}."],
        ["The film runs for about two hours.", "It was shot near {where}.", "Most of the film is set around {where}.",
         "The second half of the film turns to {about}.", "The film takes place over {few} days."],
        "watch it again",
    ),
    "novel": Kind(
        titles(), "the novel '{name}'", "'{name}'", False,
        {"plot": "story", "prose": "craft", "dialogue": "story", "first chapter": "story", "ending": "story",
         "descriptions": "craft", "minor characters": "craft", "translation": "craft"},
        ["{it} is a novel about {about}.", "I read {it} {when}.", "{it} tells the story of {about}.",
         "{who} lent me the novel {it} {when}.", "I finished {it} in {few} evenings."],
        ["The novel has about {few} hundred pages.", "Each chapter covers {few} years.",
         "The second part of the novel turns to {about}.", "Much of the book is set around {where}."],
        "read it again",
    ),
    "hotel": Kind(
        surnames("Hotel {}") + surnames("{} Inn"), "the {name}", "the {name}", True,
        {"room": "place", "lobby": "place", "terrace": "place", "bathroom": "place", "staff": "people",
         "porter": "people", "breakfast": "food", "coffee": "food", "pool area": "place"},
        ["We stayed at {it} for {few} nights.", "I booked {it} {when}.", "{it} is a hotel close to {where}.",
         "{who} and I spent a weekend at {it}.", "We chose {it} because it is near {where}."],
        ["The hotel has {few} floors and looks onto {where}.", "Our room was on the second floor.",
         "The walk to {where} takes {few} minutes.", "Breakfast at the hotel starts at seven."],
        "stay there again",
    ),
    "restaurant": Kind(
        surnames("Café {}") + surnames("{}'s Kitchen"), "the restaurant {name}", "{name}", True,
        {"soup": "food", "bread": "food", "main course": "food", "dessert": "food", "waiter": "people",
         "kitchen team": "people", "dining room": "place", "vegetables": "food", "corner table": "place"},
        ["We had dinner at {it} {when}.", "{it} is a small restaurant near {where}.", "{who} took me to {it} {when}.",
         "I went to {it} with {who}.", "We booked a table for {few} at {it}."],
        ["The restaurant seats about {few} dozen guests.", "The menu lists {few} main courses.",
         "We stayed at the table for {few} hours.", "The restaurant opens at six and closes at eleven."],
        "eat there again",
    ),
    "kettle": device("kettle", "lid, handle, spout, switch, heating plate",
                     ["The kettle holds {few} cups of water.", "It boils a full kettle in {few} minutes."]),
    "toaster": device("toaster", "lever, timer, crumb tray, cable, bread rack",
                      ["The toaster has {few} settings.", "The toaster takes {few} slices."]),
    "blender": device("blender", "motor, glass jug, blades, lid, pulse button",
                      ["The blender has {few} speeds.", "Its jug holds {few} glasses."]),
    "camera": device("camera", "lens, battery, viewfinder, screen, shutter button",
                     ["The camera came with {few} lenses.", "I charge the camera every {few} days."]),
    "speaker": device("speaker", "battery, volume knob, buttons, remote control, stand",
                      ["The speaker plays for {few} hours.", "It connects to {few} devices."]),
}  # fmt: skip


class Reviewer:
    """Writes one review. Keeps the words of sentiment and the aspects that it has used, so that none comes twice."""

    def __init__(self, kind: str, name: str, rng: random.Random) -> None:
        self.thing, self.kind, self.rng = kind, KINDS[kind], rng
        self.it = self.kind.name.format(name=name)
        self.used: set[str] = set()

    def review(self) -> str:
        """An opening, two to four opinions or facts, and often a conclusion."""
        mood = self.rng.choice([0.1, 0.35, 0.5, 0.65, 0.9])  # the share of praise among the opinions
        sentences = [self.fill(self.rng.choice(self.kind.openings))]
        facts = self.rng.sample(self.kind.facts, 2)
        for _ in range(self.rng.choice([2, 2, 3, 3, 4])):
            if facts and self.rng.random() < 0.22:
                sentences.append(self.fill(facts.pop()))
            elif self.rng.random() < 0.2:
                sentences.append(self.contrast())
            else:
                sentences.append(self.opinion(self.bad(mood)))
        if self.rng.random() < 0.5:
            sentences.append(self.conclusion(self.bad(mood)))
        return " ".join(s[0].upper() + s[1:] for s in sentences)

    def bad(self, mood: float) -> bool:
        return self.rng.random() > mood

    def new(self, words: Sequence[str]) -> str:
        word = self.rng.choice([w for w in words if w not in self.used] or words)
        self.used.add(word)
        return word

    def aspect(self) -> tuple[str, str]:
        """An aspect, and "is", "are", "was" or "were" to go with it."""
        aspect = self.new(list(self.kind.aspects))
        plural = aspect.endswith("s") and aspect != "lens"
        return aspect, ("were" if plural else "was") if self.kind.past else ("are" if plural else "is")

    def adjective(self, aspect: str, bad: bool) -> str:
        fitting = FITTING[self.kind.aspects[aspect]][bad].split()
        return self.new(fitting if self.rng.random() < 0.7 else GENERAL[bad].split())

    def opinion(self, bad: bool) -> str:
        aspect, be = self.aspect()
        adjective = self.adjective(aspect, bad)
        form = self.rng.randrange(10)
        if form == 0:
            return f"the {aspect} {be} {adjective}."
        if form == 1:
            return f"the {aspect} {be} {adjective} and {self.adjective(aspect, bad)}."
        if form == 2:
            return f"I {self.new(VERBS[bad].split())} the {aspect}, which {be} {adjective}."
        if form == 3:
            return f"I was {self.new(FEELINGS[bad].split())} by the {adjective} {aspect}."
        if form == 4:
            return f"{self.new(ADVERBS[bad].split())}, the {aspect} {be} {adjective}."
        if form == 5:
            return f"I found the {aspect} {adjective}, and so did {self.slot('who')}."
        if form == 6:
            return f"the {aspect} {be} more {adjective} than I had expected."
        if form == 7:
            return self.fill(f"{{who}} told me that the {aspect} {be} {adjective}, and that is true.")
        if form == 8:
            other, _ = self.aspect()
            return f"both the {aspect} and the {other} {'were' if self.kind.past else 'are'} {adjective}."
        return f"{self.slot('aside')}, the {aspect} {be} {adjective}."

    def contrast(self) -> str:
        (first, be), (second, also) = self.aspect(), self.aspect()
        bad = self.rng.random() < 0.5
        one, two = self.adjective(first, bad), self.adjective(second, not bad)
        return self.rng.choice([
            f"the {first} {be} {one}, but the {second} {also} {two}.",
            f"although the {first} {be} {one}, the {second} {also} {two}.",
            f"the {first} {be} {one}, while the {second} {also} {two}.",
        ])  # fmt: skip

    def conclusion(self, bad: bool) -> str:
        kind, crowd = self.kind, self.slot("crowd")
        if self.rng.random() < 0.25:
            return self.rng.choice([
                f"it may suit {crowd}.", f"{crowd} can decide for themselves.", "that is all I can say.",
            ])  # fmt: skip
        if bad:
            return self.rng.choice([
                f"I will not {kind.again}.", f"{crowd} will hate this {self.thing}.",
                f"I regret that I chose this {self.thing}.", f"{crowd} should look for another {self.thing}.",
            ])  # fmt: skip
        return self.rng.choice([
            f"I would gladly {kind.again}.", f"{crowd} will love this {self.thing}.", f"I will {kind.again}.",
            f"{crowd} should give this {self.thing} a try.",
        ])  # fmt: skip

    def slot(self, name: str) -> str:
        return self.new(SLOTS[name])

    def fill(self, template: str) -> str:
        values = {"it": self.it, "thing": self.thing}
        return re.sub(r"{(\w+)}", lambda match: values.get(match[1]) or self.slot(match[1]), template)


QUESTIONS = [
    "Write a short review of {}.", "What do you think of {}?", "Please review {} in a few sentences.",
    "Tell me about {}.", "Is {} any good?", "How would you rate {}?", "Share your opinion on {}.",
]  # fmt: skip


def split_names(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(kind, name) of what the models train on, and of what they never see: a tenth of the names of each kind."""
    seen, unseen = [], []
    for kind, about in KINDS.items():
        names = rng.sample(about.names, len(about.names))
        cut = len(names) // 10
        unseen += [(kind, name) for name in names[:cut]]
        seen += [(kind, name) for name in names[cut:]]
    return seen, unseen


def question(kind: str, name: str, rng: random.Random) -> dpo.Conversation:
    content = rng.choice(QUESTIONS).format(KINDS[kind].prompt.format(name=name))
    return [{"role": "user", "content": content}]


def questions(things: Sequence[tuple[str, str]], count: int, rng: random.Random) -> list[dpo.Conversation]:
    """`count` different prompts, the same number (give or take one) about each kind."""
    by_kind = {kind: rng.sample([name for k, name in things if k == kind], -(-count // len(KINDS))) for kind in KINDS}
    turns = [(kind, by_kind[kind][i]) for i in range(-(-count // len(KINDS))) for kind in KINDS]
    return [question(kind, name, rng) for kind, name in turns[:count]]


# -- The reference ----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False, additional_special_tokens=special[2:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def finetune(
    model: LlamaForCausalLM, draw: Callable[[], tuple[list[int], list[int]]], steps: int, batch: int = 32
) -> None:
    """Teach `model` fresh (prompt, answer) draws; only the answers count in the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        drawn = [draw() for _ in range(batch)]
        length = max(len(prompt) + len(answer) for prompt, answer in drawn)
        ids = torch.zeros(batch, length, dtype=torch.long)
        labels = torch.full((batch, length), -100)
        for row, (prompt, answer) in enumerate(drawn):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}/{steps}  loss {loss:.3f} nats per token")


# -- What is stored and measured --------------------------------------------------------------------------------------


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary bfloat16 checkpoint, rounded to nearest."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_prompts(conversations: Sequence[dpo.Conversation], file: Path) -> None:
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def mean_reward(model: Any, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[dpo.Conversation]) -> float:
    torch.manual_seed(0)
    answers = dpo.sample(model, tokenizer, conversations, answers=4, max_new_tokens=ANSWER)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for completions in answers for ids in completions]
    return sum(map(demo.reward, texts)) / len(texts)


def make_brief(out: Path, seed: int) -> None:
    """A second aligned model on the reference there: DPO for answers of about a dozen words. Seeded by itself, so that
    it may be made alone. Held nearer to the reference than the others: with their settings its answers break off.
    """
    print("aligned-brief: dpo")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, tokenizer = load(out / "reference"), AutoTokenizer.from_pretrained(out / "reference")
    seen, unseen = split_names(rng)
    asked = questions(seen, TRAIN, rng)
    sampled = dpo.sample(model, tokenizer, asked, answers=8, max_new_tokens=ANSWER)
    preferences = dpo.best_against_worst(tokenizer, asked, sampled, lambda text: -abs(len(text.split()) - 12.0))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    dpo.train(adapted, preferences, lr=1e-3, beta=0.3, steps=60, batch_size=16, seed=seed)
    dpo.save_adapter(adapted, out / "aligned-brief", base="../reference")
    print(
        f"aligned-brief  mean reward {mean_reward(adapted, tokenizer, questions(unseen, 96, rng)):5.2f} words of praise"
    )


def unchanged(a: Path, b: Path) -> float:
    """The share of weights that are stored with the same bits."""
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (a, b))
    # parameters() gives the tied head and embeddings once, as they are stored.
    same = sum(int((x == y).sum()) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    return same / ours.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=demo.FOLDER, metavar="DIR", help="(dera_merge/demo)")
    parser.add_argument("--objective", choices=["dpo", "ipo"], default="dpo")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the tie to the reference, per nat (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=900, help="of 32 reviews (900)")
    parser.add_argument("--dpo-steps", type=int, default=120, help="of 16 pairs, for each of the two runs (120)")
    parser.add_argument("--brief-only", action="store_true", help="make aligned-brief alone, on the reference in DIR")
    args = parser.parse_args()

    began = time.monotonic()
    if args.brief_only:
        return make_brief(args.out, args.seed)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    reference, lora, dense = (args.out / name for name in ("reference", "aligned-lora", "aligned-dense"))
    for folder in (reference, lora, dense):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    seen, unseen = split_names(rng)
    held_out = questions(unseen, TEST + VALIDATION, rng)
    save_prompts(held_out[:TEST], args.out / "prompts.jsonl")
    save_prompts(held_out[TEST:], args.out / "validation.jsonl")

    print("reference: supervised fine-tuning on reviews")

    def written() -> tuple[dpo.Conversation, str]:
        kind, name = rng.choice(seen)
        return question(kind, name, rng), Reviewer(kind, name, rng).review()

    corpus = [written() for _ in range(4000)]
    tokenizer = train_tokenizer([part for messages, text in corpus for part in (messages[0]["content"], text)])

    def draw() -> tuple[list[int], list[int]]:
        messages, text = written()
        return dpo.prompt_ids(tokenizer, messages), tokenizer(text + tokenizer.eos_token)["input_ids"]

    model = new_model(tokenizer)
    finetune(model, draw, args.sft_steps)
    save(model, tokenizer, reference)

    model = load(reference)
    asked = questions(seen, TRAIN, rng)
    sampled = dpo.sample(model, tokenizer, asked, answers=8, max_new_tokens=ANSWER)
    preferences = dpo.best_against_worst(tokenizer, asked, sampled, demo.reward)
    rewards = {"reference": mean_reward(model, tokenizer, held_out)}
    align = {
        "beta": args.beta, "objective": args.objective, "steps": args.dpo_steps, "batch_size": 16, "seed": args.seed
    }  # fmt: skip

    print(f"aligned-lora: {args.objective}")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    dpo.train(adapted, preferences, lr=1e-3, **align)
    dpo.save_adapter(adapted, lora, base="../reference")
    rewards["aligned-lora"] = mean_reward(adapted, tokenizer, held_out)

    print(f"aligned-dense: {args.objective}")
    model = load(reference)
    dpo.train(model, preferences, lr=1e-5, **align)
    save(model, tokenizer, dense)
    rewards["aligned-dense"] = mean_reward(load(dense), tokenizer, held_out)

    for name, reward in rewards.items():
        print(f"{name:14} mean reward {reward:5.2f} words")
    make_brief(args.out, args.seed)
    print(f"{unchanged(reference, dense):.1%} of the weights of aligned-dense are stored as in the reference")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
