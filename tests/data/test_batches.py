import pytest
import torch

from lit_adapters.data import EvalOrder, TrainOrder, collate, sequences

EXAMPLES = [
    {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]},
    {"input_ids": [1, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]},
]
LENGTHS = [(7 * i) % 31 + 1 for i in range(103)]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_collate_pads_on_the_right():
    batch = collate(EXAMPLES, pad_id=2)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[1, 5, 2, 2, 2], [1, 6, 7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 2, -100, -100], [-100, -100, 7, 8, 2]]


def test_no_examples_make_a_row_that_trains_nothing():
    batch = collate([], pad_id=9)
    assert batch["attention_mask"].sum() > 0  # attention over nothing would be NaN
    assert (batch["labels"] == -100).all()


def test_sequences_undo_collate():
    parts = sequences(collate(EXAMPLES, pad_id=2))
    assert [{k: v.tolist() for k, v in part.items()} for part in parts] == EXAMPLES


@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(group_by_length):
    order = TrainOrder(LENGTHS, batch_size=4, seed=3, group_by_length=group_by_length)
    first, second = order.batches(0), order.batches(1)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(103))
    assert len(first) == len(order) == 26
    assert first != second
    torch.manual_seed(99)
    again = TrainOrder(LENGTHS, batch_size=4, seed=3, group_by_length=group_by_length)
    state = torch.get_rng_state()
    assert again.batches(0) == first
    assert again.batches(1) == second
    assert torch.equal(torch.get_rng_state(), state)
    other = TrainOrder(LENGTHS, batch_size=4, seed=4, group_by_length=group_by_length)
    assert other.batches(0) != first


def padding(batches):
    return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches) - sum(LENGTHS)


def test_grouping_by_length_saves_padding_and_stays_shuffled():
    plain = TrainOrder(LENGTHS, 4, group_by_length=False).batches(0)
    grouped = TrainOrder(LENGTHS, 4).batches(0)
    assert padding(grouped) < padding(plain) / 4
    longest = [max(LENGTHS[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest)


def test_without_shuffle_the_data_keeps_its_order():
    assert flat(TrainOrder(LENGTHS, 4, shuffle=False).batches(7)) == list(range(103))


def test_devices_share_the_global_batches_of_a_larger_batch_size():
    one = TrainOrder(LENGTHS[:100], 4).batches(2)
    two = [TrainOrder(LENGTHS[:100], 2, rank=r, devices=2).batches(2) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_every_device_has_an_example_at_every_step(devices):
    orders = [TrainOrder(LENGTHS, 3, rank=r, devices=devices) for r in range(devices)]
    shares = [order.batches(0) for order in orders]
    assert {len(share) for share in shares} == {len(orders[0])}
    for step in zip(*shares, strict=True):
        assert len({len(batch) for batch in step}) == 1
    used = sorted(index for share in shares for index in flat(share))
    assert len(used) == len(set(used)) == 103 - 103 % devices


def test_orders_that_cannot_be():
    with pytest.raises(ValueError, match="2 examples cannot be shared by 3 devices"):
        TrainOrder([1, 2], 1, devices=3)
    with pytest.raises(ValueError, match="batch_size 0 is below 1"):
        TrainOrder([1, 2], 0)


@pytest.mark.parametrize("examples", [1, 2, 7, 8, 9, 103])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_example_exactly_once(examples, devices, batch_size):
    orders = [EvalOrder(LENGTHS[:examples], batch_size, r, devices) for r in range(devices)]
    shares = [order.batches() for order in orders]
    assert sorted(i for share in shares for i in flat(share)) == list(range(examples))
    assert {len(share) for share in shares} == {len(orders[0])}
    assert max(len(batch) for share in shares for batch in share) <= batch_size
    if devices == 1:
        assert flat(shares[0]) == list(range(examples))
        assert all(shares[0])
