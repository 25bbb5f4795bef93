"""Reading what others wrote; writing what others can read."""


import pytest
import torch
from safetensors.torch import load_file, save_file

from dera_merge.files.checkpoint import Checkpoint, TensorInfo, slices
from dera_merge.files.shards import ShardWriter

pytestmark = pytest.mark.core


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
