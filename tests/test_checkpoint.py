"""Reading what others wrote, hostile files included; writing what others can read."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from dera_merge.errors import DeraError
from dera_merge.files.atomic import load_json
from dera_merge.files.checkpoint import Checkpoint, TensorInfo, read_header, slices
from dera_merge.files.shards import ShardWriter

pytestmark = pytest.mark.core


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_safetensors_library_wrote(tmp_path):
    tensors = {"a": torch.randn(5, 7), "b": torch.arange(6), "c": torch.tensor(3.0), "d": torch.randn(2, 3, 4).bfloat16(),
               "empty": torch.empty(0, 4)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read_whole(name), tensor)
    assert torch.equal(checkpoint.read("a", 2, 4), tensors["a"][2:4])
    assert torch.equal(checkpoint.read("d", 1, 5), tensors["d"].reshape(6, 4)[1:5])


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "ünï": torch.arange(4, dtype=torch.uint8)}
    writer = ShardWriter(tmp_path / "model.safetensors", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    for name in writer.order:
        for row in tensors[name]:  # row by row
            writer.write(row)
    assert not (tmp_path / "model.safetensors").exists()  # invisible until complete
    writer.close()
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_slices_cover_every_row_once():
    info = TensorInfo(torch.float32, (3, 5, 4), None)
    assert list(slices(info, elements=16)) == [(0, 4), (4, 8), (8, 12), (12, 15)]


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
