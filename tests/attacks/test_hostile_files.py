"""Files that are broken or that someone made to do harm: each is refused in one line, and nothing is written."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from dera_merge import DeraError, ModelPair
from dera_merge.files.atomic import load_json
from dera_merge.files.checkpoint import Checkpoint, read_header
from dera_merge.merging.recipe import verify

pytestmark = pytest.mark.core


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ATTACKS = {
    "empty file": lambda f: f.write_bytes(b""),
    "header longer than the file": lambda f: f.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "header that is not JSON": lambda f: write_raw(f, b"not json"),
    "header that is a list": lambda f: write_raw(f, []),
    "deep JSON": lambda f: write_raw(f, b"[" * 100_000),
    "a tensor twice": lambda f: write_raw(f, b'{"a":%b,"a":%b}' % (2 * (json.dumps(entry()).encode(),)), bytes(8)),
    "offsets beyond the file": lambda f: write_raw(f, {"a": entry(offsets=(0, 8))}, bytes(4)),
    "offsets that overlap": lambda f: write_raw(f, {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "a hole": lambda f: write_raw(f, {"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "bytes after the end": lambda f: write_raw(f, {"a": entry()}, bytes(9)),
    "shape and bytes that do not match": lambda f: write_raw(f, {"a": entry(shape=(3,))}, bytes(8)),
    "negative shape": lambda f: write_raw(f, {"a": entry(shape=(-2,))}, bytes(8)),
    "shape of texts": lambda f: write_raw(f, {"a": entry(shape=("2",))}, bytes(8)),
    "unknown dtype": lambda f: write_raw(f, {"a": entry(dtype="F5")}, bytes(8)),
    "entry without dtype": lambda f: write_raw(f, {"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_header_is_refused_in_one_line(tmp_path, attack):
    ATTACKS[attack](tmp_path / "model.safetensors")
    with pytest.raises(DeraError) as refusal:
        read_header(tmp_path / "model.safetensors")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".."])
def test_an_index_cannot_point_outside_its_directory(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(DeraError, match="points outside"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_missing_shard_or_tensor_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(DeraError, match="lacks the shard"):
        Checkpoint(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(DeraError, match="lacks tensor a"):
        Checkpoint(tmp_path)


def test_pickles_are_read_only_when_allowed_and_never_executed(tmp_path):
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeraError, match="--allow-pickle"):
        Checkpoint(tmp_path)
    assert torch.equal(Checkpoint(tmp_path, allow_pickle=True).read_whole("a"), torch.ones(2, 2))

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeraError):
        Checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "boom").exists()


def test_json_with_a_key_twice_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(DeraError, match="'a' twice"):
        load_json(tmp_path / "x.json")


def test_an_input_that_is_cut_off_while_it_is_read_leaves_nothing(llama, tmp_path):
    ref = tmp_path / "ref"
    shutil.copytree(llama(0), ref)
    opened = ModelPair.from_pretrained(ref, llama(1, near=0))
    _ = opened.tensors
    file = ref / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(DeraError, match="the file is truncated"):
        opened.merge(tmp_path / "out", [0.3])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("side", ["ref", "aligned"])
def test_a_merge_of_a_hostile_file_is_refused_in_one_line_and_writes_nothing(llama, tmp_path, attack, side):
    folders = {"ref": llama(0), "aligned": llama(1, near=0)}
    evil = tmp_path / "evil"
    shutil.copytree(folders[side], evil)
    ATTACKS[attack](evil / "model.safetensors")
    folders[side] = evil
    with pytest.raises(DeraError) as refusal:
        ModelPair.from_pretrained(folders["ref"], folders["aligned"]).merge(tmp_path / "out", [0.5])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_takes_for_ever_is_refused(llama, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("dera_merge.models.adapter._PATIENCE", 1)
    base = llama(0)
    adapter = lora(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["rank_pattern"] = {"([a-z_.0-9]+)+!": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pair = ModelPair.from_pretrained(base, adapter)
    for attempt in (lambda: pair.merge(tmp_path / "out", [0.5]), pair.exact):
        with pytest.raises(DeraError, match="takes for ever to match"):
            attempt()


def test_a_symlink_in_the_output_is_not_written_through(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.merge(out, [0.5], progress=interrupt)
    for name in ("model.safetensors.partial", "model.safetensors", "config.json"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    pair.merge(out, [0.5], resume=True)
    assert victim.read_text() == "precious"
    assert not any(file.is_symlink() for file in out.iterdir())
    assert verify(out)["lambda"] == 0.5
