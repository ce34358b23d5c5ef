"""A LoRA step against PEFT's by work that can be counted: products, and the peak of the allocator.

A clock would be noise here; benchmarks/step.py has one.
"""

import copy
from functools import partial

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lit_adapters import LoRA, LoRAGA, attach, initialise
from lit_adapters.blocks import make_lean
from tests.models import llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 200, "num_hidden_layers": 4}

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def ours(base, dropout):
    attach(base, LoRA(rank=8, alpha=16, dropout=dropout, targets=TARGETS))
    return base.train()


def peers(base, dropout):
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)
    return peft.get_peft_model(base, config).train()


def work(model):
    """Floating-point operations of a step, and bytes above the model at its peak."""
    ids = torch.arange(2 * 64).view(2, 64)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops(), peak(step)


def peak(act):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
    return held.cumsum(0).max().item()


@pytest.mark.parametrize(
    ("dtype", "dropout", "most"),
    [
        (torch.float32, 0.0, 1.0),
        (torch.float32, 0.05, 0.85),  # no dropped copies of what goes in
        (torch.bfloat16, 0.0, 0.85),  # nor fp32 ones
        (torch.bfloat16, 0.05, 0.75),
    ],
)
def test_a_step_does_no_more_work_than_pefts_and_holds_less(dtype, dropout, most):
    base = llama(**SIZES).to(dtype)
    flops, peak = zip(
        *(work(make(copy.deepcopy(base), dropout)) for make in (ours, peers)), strict=True
    )
    assert flops[0] == flops[1] > 0
    assert peak[0] <= most * peak[1]
    assert peak[0] > 0.3 * peak[1]  # both were counted


def operations(model):
    """How many of torch's operations a forward and a backward pass are, views included."""
    ids = torch.arange(2 * 64).view(2, 64)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(event.name.startswith("aten::") for event in profiler.events())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.8), (torch.bfloat16, 0.54)])
def test_a_step_as_fits_make_it_holds_less_again_and_calls_torch_less_often(dtype, most):
    base = llama(**SIZES).to(dtype)
    mine, theirs = (make(copy.deepcopy(base), 0.0) for make in (ours, peers))
    assert make_lean(mine)
    (flops, peak), (their_flops, their_peak) = work(mine), work(theirs)
    assert flops == their_flops  # what is made again takes no products
    assert 0.3 * their_peak < peak <= most * their_peak
    assert operations(mine) < 0.95 * operations(theirs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PEFT's
def test_a_start_from_gradients_holds_less_than_a_third_of_what_pefts_holds():
    base = llama(**{**SIZES, "hidden_size": 512, "intermediate_size": 1408}).eval()
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    batch = {"input_ids": torch.arange(64)[None], "labels": torch.arange(64)[None]}

    def ours(model):
        attach(model, LoRA(rank=8, alpha=16, targets=TARGETS))
        initialise(model, LoRAGA(), [batch])

    def peers(model):
        preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
        peft.get_peft_model(model, config)

    mine, theirs = (peak(partial(start, copy.deepcopy(base))) for start in (ours, peers))
    assert 0.1 * theirs < mine < 0.285 * theirs  # .273; with a copy of every adapter .294
