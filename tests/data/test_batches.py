import math
import random
import statistics

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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(group_by_length, packed):
    by_length = {"group_by_length": group_by_length, "packed": packed}
    order = TrainOrder(LENGTHS, batch_size=4, seed=3, **by_length)
    first, second = order.batches(0), order.batches(1)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(103))
    assert len(first) == len(order) == 26
    assert first != second
    torch.manual_seed(99)
    again = TrainOrder(LENGTHS, batch_size=4, seed=3, **by_length)
    state = torch.get_rng_state()
    assert again.batches(0) == first
    assert again.batches(1) == second
    assert torch.equal(torch.get_rng_state(), state)
    other = TrainOrder(LENGTHS, batch_size=4, seed=4, **by_length)
    assert other.batches(0) != first


def padding(batches):
    return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches) - sum(LENGTHS)


def test_grouping_by_length_saves_padding_and_stays_shuffled():
    plain = TrainOrder(LENGTHS, 4, group_by_length=False).batches(0)
    grouped = TrainOrder(LENGTHS, 4).batches(0)
    assert padding(grouped) < padding(plain) / 4
    longest = [max(LENGTHS[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest)


@pytest.mark.parametrize("devices", [1, 3])
def test_packed_batches_hold_nearly_the_same_number_of_tokens(devices):
    lengths = [round(math.exp(random.Random(i).gauss(4, 0.7))) for i in range(960)]

    def tokens(**settings):
        orders = [
            TrainOrder(lengths, 8, rank=r, devices=devices, **settings) for r in range(devices)
        ]
        batches = [batch for order in orders for batch in order.batches(0)]
        assert {len(batch) for batch in batches} == {8}
        assert sorted(flat(batches)) == list(range(960))
        return [sum(lengths[i] for i in batch) for batch in batches]

    mean = sum(lengths) * 8 / 960
    even, chance = tokens(packed=True), tokens(packed=True, group_by_length=False)
    assert max(even) < 1.15 * mean < 1.6 * mean < max(chance)
    assert statistics.stdev(even) < statistics.stdev(chance) / 5


@pytest.mark.parametrize("packed", [False, True])
def test_without_shuffle_the_data_keeps_its_order(packed):
    order = TrainOrder(LENGTHS, 4, shuffle=False, packed=packed)
    assert flat(order.batches(7)) == list(range(103))


@pytest.mark.parametrize("packed", [False, True])
def test_devices_share_the_global_batches_of_a_larger_batch_size(packed):
    one = TrainOrder(LENGTHS[:100], 4, packed=packed).batches(2)
    two = [
        TrainOrder(LENGTHS[:100], 2, rank=r, devices=2, packed=packed).batches(2) for r in (0, 1)
    ]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_every_device_has_an_example_at_every_step(devices, packed):
    orders = [
        TrainOrder(LENGTHS, 3, rank=r, devices=devices, packed=packed) for r in range(devices)
    ]
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


# --- batches of so many tokens -------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("tokens", [31, 64, 1000])
def test_batches_by_tokens_are_as_many_in_every_epoch(packed, devices, tokens):
    def size(batch):
        lengths = [LENGTHS[i] for i in batch]
        return sum(lengths) if packed else max(lengths) * len(lengths)

    orders = [
        TrainOrder(LENGTHS, 4, rank=r, devices=devices, batch_tokens=tokens, packed=packed)
        for r in range(devices)
    ]
    seen = []
    for epoch in range(8):
        shares = [order.batches(epoch) for order in orders]
        assert {len(share) for share in shares} == {len(orders[0])}
        whole = [batch for share in shares for batch in share]
        assert sorted(flat(whole)) == list(range(103))
        assert all(batch and size(batch) <= tokens for batch in whole)
        seen.append(whole)
    assert seen[0] != seen[1]
    again = TrainOrder(LENGTHS, 4, devices=devices, batch_tokens=tokens, packed=packed)
    assert again.batches(5) == orders[0].batches(5)


def test_packed_batches_are_nearly_full():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 512, (5000,), generator=generator).tolist()
    for tokens in (512, 2048):
        order = TrainOrder(lengths, 8, batch_tokens=tokens, packed=True)
        assert sum(lengths) / (len(order) * tokens) > 0.96
        assert len({len(order.batches(epoch)) for epoch in range(4)}) == 1
        together = [set(order.batches(epoch)[0]) for epoch in range(2)]
        assert together[0] != together[1]


def test_examples_that_cannot_be_shared_evenly_take_turns_in_being_left_out():
    order = TrainOrder([5] * 7, 4, devices=2, batch_tokens=5, packed=True)
    assert len(order) == 3
    left = [set(range(7)) - set(flat(order._fill(epoch, 6))) for epoch in range(10)]
    assert {len(out) for out in left} == {1}
    assert len(set.union(*left)) > 2


def test_without_shuffle_batches_by_tokens_are_the_same_in_every_epoch():
    order = TrainOrder(LENGTHS, 4, shuffle=False, batch_tokens=64, packed=True)
    assert order.batches(0) == order.batches(1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_evaluation_by_tokens_sees_every_example_exactly_once(packed, devices):
    orders = [
        EvalOrder(LENGTHS, 4, r, devices, batch_tokens=40, packed=packed) for r in range(devices)
    ]
    shares = [order.batches() for order in orders]
    assert sorted(i for share in shares for i in flat(share)) == list(range(103))
    assert {len(share) for share in shares} == {len(orders[0])}
    for batch in flat(shares):
        lengths = [LENGTHS[i] for i in batch]
        assert (sum(lengths) if packed else len(lengths) * max(lengths, default=0)) <= 40
    if devices == 1:
        assert flat(shares[0]) == list(range(103))


def test_an_example_beyond_the_budget_is_an_error_with_the_remedy():
    for make in (TrainOrder, EvalOrder):
        with pytest.raises(ValueError, match=r"batch_tokens 30 is below the longest example \(31"):
            make(LENGTHS, 4, batch_tokens=30)


# --- packed rows ---------------------------------------------------------------------------------


def test_collate_packs_one_behind_the_other():
    batch = collate(EXAMPLES, pad_id=2, packed=True)
    assert batch.pop("use_cache") is False
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[1, 5, 2, 1, 6, 7, 8, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 5, 2, -100, -100, 7, 8, 2]]


@pytest.mark.parametrize("packed", [True, False])
def test_the_first_token_of_a_sequence_has_no_label(packed):
    """In a packed row, the last token of the sequence before would be trained to predict it."""
    rows = [{"input_ids": [1, 5, 2], "labels": [1, 5, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    parts = sequences(collate(rows, 0, packed))
    assert [part["labels"].tolist() for part in parts] == [[-100, 5, 2], [-100, 4]]
    assert [part["input_ids"].tolist() for part in parts] == [[1, 5, 2], [3, 4]]


def test_no_examples_make_a_packed_row_that_trains_nothing():
    batch = collate([], pad_id=9, packed=True)
    assert (batch["labels"] == -100).all()
    assert len(sequences(batch)) == 1
