"""Make PyPI's torchvision importable beside a torch for CPUs; `make test-vllm` runs this in an environment of its own.

PyPI has torchvision for CUDA alone. Without it vLLM imports none of its classes that see images, though exact DeRa
serves them for text, and needs nothing of torchvision. What stops the import is that two operators on boxes are not
declared where its compiled part cannot be loaded; here they are, without code behind them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# Declared by dera-merge."
DECLARED = f"""

{MARK}
if not _has_ops():
    _boxes = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _boxes.define(f"{{_name}}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Append the declarations to torchvision's extension.py, once."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed")
    place = Path(spec.origin).with_name("extension.py")
    if MARK not in place.read_text():
        place.write_text(place.read_text() + DECLARED)


if __name__ == "__main__":
    main()
