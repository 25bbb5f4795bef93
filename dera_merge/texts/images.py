"""Prompts that show images: parts of messages, `{"type": "image", "path": …}`, and what a processor makes of them.

Only local files are opened: a prompt file must not make this machine fetch an address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Shown = dict[str, Any]  # what a processor gives beside the tokens of a prompt that shows images, mostly tensors


def is_content(content: Any) -> bool:
    """Whether it is what a message may say: a text, or a list of parts, each a text or something that is shown."""
    if isinstance(content, str):
        return True
    return isinstance(content, list) and bool(content) and all(map(_is_part, content))


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What messages show beside their texts, in order."""
    for message in messages:
        if isinstance(message.get("content"), list):
            yield from (part for part in message["content"] if part["type"] != "text")


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which each text is a part of its own."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def joined(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """What a message says; parts that are all texts as one text, since templates of text models know no parts."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "\n".join(part["text"] for part in content)


def located(row: Any, folder: Path) -> Any:
    """A row in whose conversations the paths of images are absolute; relative ones are so to `folder`.

    Raises:
        ValueError: something is shown that is no local file, or there is no such file.
    """

    def found(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") in (None, "text"):
            return part
        if part["type"] != "image" or not isinstance(part.get("path"), str):
            raise ValueError('an image is {"type": "image", "path": …}, a local file')
        if not (folder / part["path"]).is_file():
            raise ValueError(f"there is no image {part['path']}")
        return part | {"path": str((folder / part["path"]).resolve())}

    def seen(turn: Any) -> Any:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
            return turn
        return turn | {"content": [found(part) for part in turn["content"]]}

    if not isinstance(row, dict):
        return row
    return {name: [seen(turn) for turn in value] if isinstance(value, list) else value for name, value in row.items()}


def turn(prompt: str, images: list[Path]) -> dict[str, Any]:
    """A user's turn that shows images, and then says something."""
    shown = [{"type": "image", "path": str(path)} for path in images]
    try:
        return located({"messages": [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]}, Path())
    except ValueError as error:
        raise DeraError(str(error)) from None


def in_words(content: str | list[dict[str, Any]]) -> str:
    """What a message says, with the names of files in the place of images."""
    if isinstance(content, str):
        return content
    return "\n".join(
        part["text"] if part["type"] == "text" else f"[{part['type']} {Path(str(part.get('path', ''))).name}]"
        for part in content
    )


def looked_at(messages: list[dict[str, Any]], processor: ProcessorMixin) -> tuple[str, list[int], Shown]:
    """A prompt that shows images: as text, as token ids, and what else a model takes, pixels first of all.

    Args:
        messages: whose images are local files.
        processor: of the pair; its chat template is used, or its tokenizer's where it has none.

    Raises:
        DeraError: an image cannot be read, or the chat template refuses the messages.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise DeraError("neither the processor nor the tokenizer has a chat template, which says where an image goes")
    told = [
        message | {"content": [_opened(part) for part in message["content"]]} if "content" in message else message
        for message in as_parts(messages)
    ]
    how = {"chat_template": template, "add_generation_prompt": True}
    try:
        text = processor.apply_chat_template(told, tokenize=False, **how)
        inputs = dict(processor.apply_chat_template(told, tokenize=True, return_dict=True, return_tensors="pt", **how))
    except Exception as error:  # templates and image libraries raise what they like
        raise DeraError(f"the processor refuses the messages: {error}") from error
    (ids,) = inputs.pop("input_ids").tolist()
    inputs.pop("attention_mask", None)
    return text, ids, inputs


def digest(shown: Shown) -> str:
    """SHA-256 of what a processor made of the images."""
    total = hashlib.sha256()
    for name, value in sorted(shown.items()):
        content = value.cpu().numpy().tobytes() if hasattr(value, "cpu") else repr(value).encode()
        total.update(f"{name} {tuple(getattr(value, 'shape', ()))}".encode() + content)
    return total.hexdigest()


def beside(shown: Shown, tokens: int, model: PreTrainedModel) -> Shown:
    """What a model takes beside `tokens` tokens that begin with a prompt: on its device, pixels in its dtype.

    What says for each token whether it stands for a piece of an image is 0 behind the prompt.
    """
    import torch

    taken: Shown = {}
    for name, value in shown.items():
        if isinstance(value, torch.Tensor):
            value = value.to(model.device, model.dtype if value.is_floating_point() else None)
        if name.endswith("token_type_ids"):
            value = torch.nn.functional.pad(value, (0, tokens - value.shape[1]))
        taken[name] = value
    return taken


def _opened(part: dict[str, Any]) -> dict[str, Any]:
    """A part with its image in the place of the path. Raises DeraError where it cannot be read."""
    if part["type"] != "image":
        return part
    try:
        from PIL import Image

        with Image.open(part["path"]) as image:
            return {"type": "image", "image": image.convert("RGB")}
    except ImportError as error:
        raise DeraError("reading images needs Pillow: pip install pillow") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DeraError(f"the image {part['path']} cannot be read: {error}") from error
