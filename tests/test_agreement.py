"""What ranks say of their differences; that they are compared at all is shown with real ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lit_adapters import LoRA, attach
from lit_adapters.agreement import _checksum, as_texts, compare, differences, start_of, structure_of
from tests.models import llama


def said_of(*facts):
    return differences([as_texts(of_rank) for of_rank in facts])


def test_one_rank_has_nobody_to_differ_from():
    compare(lambda: pytest.fail("facts are found out for nobody"))


def test_what_is_equal_is_passed_over():
    assert said_of({"a": 1, "b": {"c": [2.0, None]}}, {"a": 1, "b": {"c": [2.0, None]}}) == ""


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (({"a": {"b": 1}}, {"a": {"b": 2}}), "a.b is 1 on rank 0 and 2 on rank 1"),
        (({"a": 1}, {"a": 2}, {"a": 1}), "a is 1 on ranks 0, 2 and 2 on rank 1"),
        (({"a": 1}, {}), "a is 1 on rank 0 and missing on rank 1"),
        (({"a": "x" * 99}, {"a": "y"}), "a is of digest "),
        (({str(n): 0 for n in range(7)}, {}), "; and 2 more"),
    ],
)
def test_what_differs_is_named_with_its_ranks(facts, said):
    assert said in said_of(*facts)


def test_where_an_object_lies_in_memory_is_no_difference():
    assert said_of({"a": [object()]}, {"a": [object()]}) == ""


def test_any_value_of_a_tensor_counts_and_its_place():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = torch.arange(1, 101).to(dtype).view(10, 10)
        found = _checksum(tensor)
        assert found == _checksum(tensor.clone())
        for place in (0, 3, 57, 99):
            changed = tensor.clone()
            changed.view(-1)[place] += 1
            assert _checksum(changed) != found
        assert _checksum(tensor.flip(0)) != found


def test_structures_differ_by_targets_and_by_base():
    def facts(base, spec):
        attach(base, spec)
        return structure_of(base)

    found = facts(llama(), LoRA(rank=2))
    assert found == facts(llama(), LoRA(rank=2))
    assert found["number of trained tensors"] == 28
    assert found != facts(llama(), LoRA(rank=2, targets=["q_proj"]))
    assert found["base model"] != facts(llama(1), LoRA(rank=2))["base model"]


class Endless(IterableDataset):
    def __iter__(self):
        yield 0


def test_data_without_a_length_has_a_start():
    model = llama()
    attach(model, LoRA(rank=2))
    trainer = SimpleNamespace(
        train_dataloader=DataLoader(Endless()),
        num_training_batches=float("inf"),
        optimizers=[],
        datamodule=None,
    )
    found = start_of(SimpleNamespace(trainer=trainer, model=model))
    assert found["training batches"] == float("inf")
