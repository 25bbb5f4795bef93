"""Direct preference optimisation in a page, shared by the scripts that make pairs.

`sample` draws a model's own answers, `best_against_worst` makes preference pairs of them by a reward, and `train` moves
a model away from itself. Nothing here knows where prompts and rewards come from, or which model it is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
Objective = Literal["dpo", "ipo", "rebel"]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt as token ids, with the end token unless they were cut at the length limit.

    `gap` is the reward of the first less that of the second, for objectives that ask for more than which is better.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    gap: float = 0.0


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Token ids of the conversation, up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)


@torch.inference_mode()
def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    answers: int,
    max_new_tokens: int,
    batch_size: int = 32,
    quiet: bool = False,
) -> list[list[list[int]]]:
    """Answers to each conversation as token ids, at temperature 1 with no warper; `batch_size` counts conversations."""
    end, sampled = tokenizer.eos_token_id, []
    for start in range(0, len(conversations), batch_size):
        prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations[start : start + batch_size]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=answers,
            max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
        sampled += [rows[i : i + answers] for i in range(0, len(rows), answers)]
        if not quiet:
            print(f"  sampled answers to {len(sampled)}/{len(conversations)} prompts", flush=True)
    return sampled


def best_against_worst(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampled: Sequence[Sequence[list[int]]],
    reward: Callable[[str], float],
) -> list[Preference]:
    """Each prompt's answer of the highest reward against that of the lowest; prompts whose answers tie are left out."""
    preferences = []
    for prompt, answers, rewards in _rewarded(tokenizer, conversations, sampled, reward):
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        if rewards[best] > rewards[worst]:
            preferences.append(Preference(prompt, answers[best], answers[worst]))
    return preferences


def neighbours(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampled: Sequence[Sequence[list[int]]],
    reward: Callable[[str], float],
) -> list[Preference]:
    """Each prompt's first answer against its second, third against fourth, and so on, ties too, with their gaps."""
    return [
        Preference(prompt, answers[i], answers[i + 1], rewards[i] - rewards[i + 1])
        for prompt, answers, rewards in _rewarded(tokenizer, conversations, sampled, reward)
        for i in range(0, len(answers) - 1, 2)
    ]


def _rewarded(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    sampled: Sequence[Sequence[list[int]]],
    reward: Callable[[str], float],
) -> Iterator[tuple[list[int], Sequence[list[int]], list[float]]]:
    """Each prompt's ids, its answers and their rewards."""
    for conversation, answers in zip(conversations, sampled, strict=True):
        rewards = [reward(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
        yield prompt_ids(tokenizer, conversation), answers, rewards


def completion_logprobs(
    model: PreTrainedModel | PeftModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> Tensor:
    """log π(completion | prompt) of each row, in nats, summed over the completion's tokens."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    # Padding on the right needs no attention mask: causal attention never looks there, and the labels leave it out.
    input_ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    return -F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(dim=1)


def margins(model: PreTrainedModel | PeftModel, preferences: Sequence[Preference]) -> Tensor:
    """log π(chosen | prompt) - log π(rejected | prompt) of each preference, in nats."""
    completions = [p.chosen for p in preferences] + [p.rejected for p in preferences]
    chosen, rejected = completion_logprobs(model, [p.prompt for p in preferences] * 2, completions).chunk(2)
    return chosen - rejected


def descent(model: PreTrainedModel | PeftModel, lr: float, steps: int) -> Callable[[Tensor], None]:
    """A function that takes the next of `steps` steps down a loss.

    AdamW without weight decay; the rate reaches `lr` after a tenth of the steps and is then lowered linearly to 0;
    gradients are clipped to norm 1.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps, 1)
    )

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()

    return descend


def train(
    model: PreTrainedModel | PeftModel,
    preferences: Sequence[Preference],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    beta: float = 0.1,
    objective: Objective = "dpo",
    seed: int = 0,
) -> None:
    """Align `model` in place; as it is given, it is the reference.

    With m = margin under the model - margin under the reference, in nats, the loss of a preference is

        dpo     -log σ(β·m)         Rafailov et al., 2023
        ipo     (m - 1/(2β))²       Azar et al., 2024
        rebel   (m - gap/β)²        Gao et al., 2024: its optimum is π_ref·exp(r/β)/Z itself

    Args:
        steps: steps of AdamW, each on `batch_size` preferences.
        lr: peak learning rate, see `descent`.
        beta: strength of the tie to the reference.
    """
    model.eval()  # Dropout would make the reference's log-probabilities random.
    with torch.no_grad():
        batches = [preferences[i : i + batch_size] for i in range(0, len(preferences), batch_size)]
        reference = torch.cat([margins(model, batch) for batch in batches])

    descend = descent(model, lr, steps)
    rng, order = random.Random(seed), []
    for step in range(steps):
        while len(order) < batch_size:
            order += rng.sample(range(len(preferences)), len(preferences))
        batch, order = order[:batch_size], order[batch_size:]
        margin = margins(model, [preferences[i] for i in batch]) - reference[batch]
        if objective == "dpo":
            losses = -F.logsigmoid(beta * margin)
        else:
            wanted = torch.tensor([preferences[i].gap for i in batch]) if objective == "rebel" else torch.tensor(0.5)
            losses = (margin - wanted / beta) ** 2
        loss = losses.mean()
        descend(loss)
        if (step + 1) % 10 == 0:
            print(f"  step {step + 1}/{steps}: loss {loss:.4f}, margin {margin.mean():.2f} nats", flush=True)


def save_adapter(model: PeftModel, out: Path, base: str) -> None:
    """Save a LoRA adapter without PEFT's model card; the same weights give the same bytes.

    Args:
        base: what the adapter names as its base model; a relative path counts from the adapter's directory.
    """
    model.peft_config["default"].base_model_name_or_path = base
    # The embeddings are frozen, and PEFT would ask the Hub about `base` to find that out.
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()
    # PEFT writes every option that it knows, and the target modules in the order of a hash.
    config = json.loads((out / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if value not in (None, False, 0, {}, [])}
    config["target_modules"].sort()
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
