"""Weights are written to the bit as safetensors does, and hashed on the way."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save

from lit_adapters.tensor_file import NAMES, sha256, write_tensors

CASES = {
    "fp32": {"b": torch.randn(3, 5), "a": torch.randn(8, 2)},
    "bf16": {"w": torch.randn(7).bfloat16()},
    "mixed": {"a": torch.randn(3).half(), "z": torch.tensor(7), "m": torch.randn(2, 2)},
    "large": {"t": torch.randn(700, 1001), "s": torch.randn(1)},  # more than the buffer
    "empty": {"none": torch.empty(0, 4), "one": torch.ones(1)},
    "names": {'quote " and \\': torch.ones(1), "é.🙂": torch.zeros(2), "line\n": torch.ones(3)},
    "nothing": {},
}


@pytest.mark.parametrize("tensors", CASES.values(), ids=list(CASES))
def test_the_file_is_that_of_the_library_and_the_digest_that_of_the_file(tmp_path, tensors):
    file = tmp_path / "w.safetensors"
    digest = write_tensors(file, tensors)
    assert file.read_bytes() == save(tensors, {"format": "pt"})
    assert digest == sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_type_is_read_back(tmp_path):
    tensors = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in NAMES}
    write_tensors(tmp_path / "w.safetensors", tensors)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].float(), tensor.float())
