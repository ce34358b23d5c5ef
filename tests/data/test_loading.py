import pytest
import torch

from lit_adapters.data import BatchLoader, EvalOrder, TrainOrder

EXAMPLES = [{"input_ids": [1, i, 2], "labels": [-100, i, 2]} for i in range(10)]


def make_loader(num_workers=0, **settings):
    order = TrainOrder([3] * 10, **{"batch_size": 3, "seed": 5, **settings})
    return BatchLoader(EXAMPLES, order, pad_id=0, num_workers=num_workers)


def seen(batches):
    return [batch["input_ids"][:, 1].tolist() for batch in batches]


def test_each_iteration_is_an_epoch_with_its_own_order():
    loader = make_loader()
    assert len(loader) == 4
    assert seen(loader) == loader.order.batches(0)
    assert seen(loader) == loader.order.batches(1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_taken_within_an_epoch_continues_with_the_next_batch(num_workers):
    loader = make_loader(num_workers)
    list(loader)
    running = iter(loader)
    head = seen([next(running), next(running)])
    resumed = make_loader(num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert head + seen(resumed) == loader.order.batches(1)
    assert seen(resumed) == loader.order.batches(2)


def test_a_state_taken_at_the_end_of_an_epoch_continues_with_the_next_epoch():
    loader = make_loader()
    list(loader)
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert seen(resumed) == loader.order.batches(1)


def test_a_state_of_another_order_is_warned_about():
    state = make_loader().state_dict()
    make_loader(rank=0).load_state_dict(state)
    for change in ({"seed": 6}, {"batch_size": 2}, {"group_by_length": False}):
        with pytest.warns(UserWarning, match="not the one of the checkpoint"):
            make_loader(**change).load_state_dict(state)


def test_the_state_is_the_same_on_every_device():
    states = [make_loader(rank=rank, devices=2).state_dict() for rank in (0, 1)]
    assert states[0] == states[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(num_workers):
    before = torch.get_rng_state()
    list(make_loader(num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_without_examples_gets_a_batch_that_trains_nothing():
    loader = BatchLoader(EXAMPLES[:1], EvalOrder([3], 4, rank=1, devices=2), pad_id=0)
    assert [(batch["labels"] != -100).sum().item() for batch in loader] == [0]
