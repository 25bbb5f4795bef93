"""The weight files of a model or an adapter: which are read, whether they are whole, and what numbers they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import DeraError
from ..files.checkpoint import REAL, Checkpoint, PickledOnly, indexed, read_header, slices
from ..models.damage import why_empty
from ..models.trust import Trust
from .findings import Findings


def open_weights(findings: Findings, folder: Path, stem: str, trust: Trust) -> Checkpoint | None:
    """The tensors of a directory; None where they cannot be read, with a finding that says why."""
    try:
        return Checkpoint(folder, stem, trust.pickle)
    except DeraError as error:
        findings.reason("weights", str(error), broken=not isinstance(error, PickledOnly))
    return None


def check_files(findings: Findings, checkpoint: Checkpoint, stem: str) -> None:
    """Files that nothing reads, and tensors that an index does not name."""
    read = checkpoint.files[0].name
    if unread := [file.name for file in checkpoint.unread()]:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        findings.warn(unread[0], f"it{more} lies beside {read} and is not read", "remove what is stale")
    index = checkpoint.folder / f"{stem}.safetensors.index.json"
    if index.is_file() and read not in (f"{stem}.safetensors", f"{stem}.bin"):
        for file, expected in indexed(index).items():
            if extra := read_header(file).keys() - (expected or set()):
                findings.warn(
                    file.name,
                    f"it holds {min(extra)} ({len(extra)} such), which {index.name} does not name",
                    "write the index anew, with save_pretrained",
                )


def check_values(findings: Findings, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> None:
    """Tensors that hold nothing, NaN, infinity, or a matrix of zeros."""
    if reason := why_empty(checkpoint.tensors):
        findings.reason("weights", reason)
        return
    odd, zero = [], []
    for number, (name, info) in enumerate(checkpoint.tensors.items(), 1):
        if info.dtype in REAL:
            finite, some = True, False
            for rows in slices(info):
                values = checkpoint.read(name, *rows)
                finite = finite and bool(values.isfinite().all())
                some = some or bool(values.any())
            odd += [] if finite else [name]
            zero += [] if some or len(info.shape) < 2 or name.endswith("bias") else [name]
        if progress:
            progress(number, len(checkpoint.tensors))
    if odd:
        findings.broken(
            odd[0],
            f"it holds NaN or infinity ({len(odd)} tensors in all)",
            "training broke down, or saving did: take an earlier checkpoint",
        )
    if zero and not checkpoint.files[0].name.startswith("adapter"):
        findings.warn(zero[0], f"all of it is zero ({len(zero)} matrices in all)", "save it again, gathered")
