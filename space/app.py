"""`dera-merge play` as a Space. Its variables REF and ALIGNED name another pair on the Hub than the one inside."""

import os

import torch

from dera_merge import ModelPair, demo
from dera_merge.playing.both import Both
from dera_merge.playing.page import Desk, build, launching
from dera_merge.texts.prompts import built_in

torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # two texts are written at once, a thread each
ref, aligned = os.environ.get("REF"), os.environ.get("ALIGNED")
prompts = built_in()[:5] if ref and aligned else demo.prompts()[2:7]
pair = ModelPair.from_pretrained(*((ref, aligned) if ref and aligned else (demo.REF, demo.ALIGNED_LORA)))
names = f"{ref} {aligned}" if ref and aligned else '"$REF" "$ALIGNED"'
both = Both(pair, "cuda" if torch.cuda.is_available() else "cpu")
with both.merged(0.5):  # loaded before the first visitor comes
    pass
page = build(pair, Desk(both, f"dera-merge merge {names}"), [row["messages"][-1]["content"] for row in prompts], [0.5])
page.launch(**launching())
