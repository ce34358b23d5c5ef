"""bitsandbytes' optimizers by class path, on a CPU: bytes of their states, what they learn, resume.

Its states are blocks of 256 bytes with one fp32 scale: 1 + 4/256 = 1.0156 bytes an element.
"""

import logging
import math
from functools import cache, partial

import pytest
import torch
from lightning.pytorch import seed_everything

from lit_adapters import AdapterFineTuneModule, FullFineTuning, GaLore, LoRA
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.footprint import optimizer_bytes
from lit_adapters.optim import unpacked
from lit_adapters.weights import hush
from tests.models import llama, trainable
from tests.test_checkpoint import Batches
from tests.test_cli import fit_arguments, run
from tests.test_module import examples, in_batches, make, make_trainer

hush()
bnb = pytest.importorskip("bitsandbytes").optim

PAGING = "ignore:Paged optimizers are not supported on CPU"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings(PAGING),
]

ADAM = {"lr": 1e-3, "weight_decay": 0.01}
PLAIN_ADAM = {"lr": 1e-3, "weight_decay": 0.0}
LION = {"lr": 1e-4, "weight_decay": 0.01}
SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}
RMSPROP = {"lr": 2e-4, "alpha": 0.9}
# Made once, so that the runs they are compared with are made once.
ADAMW_IN_FP32 = partial(torch.optim.AdamW, **ADAM)
GALORE_8BIT = partial(bnb.AdamW8bit, min_8bit_size=1024, **ADAM)
LION_IN_FP32 = partial(bnb.Lion, **LION)
# Of each: the class, its moments that are packed, and what computes the same in fp32.
KINDS = {
    "AdamW8bit": (partial(bnb.AdamW8bit, **ADAM), 2, ADAMW_IN_FP32),
    "PagedAdamW8bit": (partial(bnb.PagedAdamW8bit, **ADAM), 2, ADAMW_IN_FP32),
    "Adam8bit": (partial(bnb.Adam8bit, **PLAIN_ADAM), 2, partial(torch.optim.Adam, **PLAIN_ADAM)),
    "AdamW": (partial(bnb.AdamW, **ADAM), 0, ADAMW_IN_FP32),
    "Lion8bit": (partial(bnb.Lion8bit, **LION), 1, LION_IN_FP32),
    "PagedLion8bit": (partial(bnb.PagedLion8bit, **LION), 1, LION_IN_FP32),
    "SGD8bit": (partial(bnb.SGD8bit, **SGD), 1, partial(torch.optim.SGD, **SGD)),
    "RMSprop8bit": (partial(bnb.RMSprop8bit, **RMSPROP), 1, partial(bnb.RMSprop, **RMSPROP)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
packing = pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][1]])


@cache  # two kinds share the fp32 they are compared with
def losses_on_real_records(make_optimizer, rank=None):
    """Validation loss before and after 24 steps of full fine-tuning, and the optimizer.

    With a rank, by GaLore.
    """
    seed_everything(0, verbose=False)
    data = InstructionDataModule("tiny", batch_size=4, max_length=96, train_limit=96)
    module = AdapterFineTuneModule(
        "tiny", adapter=FullFineTuning(), optimizer=make_optimizer, warmup=3
    )
    callbacks = [GaLore(rank, update_gap=8, scale=1.0)] if rank else []
    trainer = make_trainer(
        None, max_steps=24, limit_val_batches=4, num_sanity_val_steps=0, callbacks=callbacks
    )
    [before] = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    optimizer = trainer.optimizers[0]
    [after] = trainer.validate(module, data, verbose=False)
    return before["val/loss"], after["val/loss"], optimizer


def held(optimizer, parameter):
    """Bytes of a parameter's own moments and scales."""
    tensors = {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    return sum(value.nbytes for name, value in tensors.items() if not name.startswith("qmap"))


# ---------------------------------------------------------------- learning and bytes


@every_kind
def test_it_ends_where_fp32_does_with_a_byte_an_element(kind):
    make_optimizer, moments, reference = KINDS[kind]
    before, after, optimizer = losses_on_real_records(make_optimizer)
    start, expected, _ = losses_on_real_records(reference)
    print(f"{kind}: {before:.4f} -> {after:.4f}, fp32 {expected:.4f}")
    assert before == start
    assert expected < 0.9 * start  # five times what is allowed below
    assert after == pytest.approx(expected, rel=0.02)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    large = [p for p in stepped if p.numel() >= 4096]
    assert sum(p.numel() for p in large) > 0.99 * sum(p.numel() for p in stepped)
    for parameter in stepped:
        states = moments or 2  # AdamW of 32 bits has two
        if parameter.numel() >= 4096 and moments:
            assert optimizer.state[parameter]["state1"].dtype == torch.uint8
            assert moments * parameter.numel() < held(optimizer, parameter)
            assert held(optimizer, parameter) <= 1.02 * moments * parameter.numel()
        else:  # norms: too small
            assert held(optimizer, parameter) == 4 * states * parameter.numel()


def test_around_galore_s_shadows_they_do_the_same():
    """Rank 16 of 128: the largest moments are 352 x 16 = 5632 elements."""
    found = {}
    for name, make_optimizer in (("8-bit", GALORE_8BIT), ("fp32", ADAMW_IN_FP32)):
        before, found[name], optimizer = losses_on_real_records(make_optimizer, rank=16)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if name == "8-bit":
            large = [p for p in stepped if p.numel() >= 1024]
            assert {tuple(p.shape) for p in large} >= {(352, 16), (16, 352), (128, 16)}
            assert all(held(optimizer, p) <= 1.02 * 2 * p.numel() for p in large)
    print(f"GaLore: {before:.4f} -> {found['8-bit']:.4f}, fp32 {found['fp32']:.4f}")
    assert found["fp32"] < 0.9 * before
    assert found["8-bit"] == pytest.approx(found["fp32"], rel=0.02)


def test_the_maps_that_all_states_share_count_once():
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    optimizer = bnb.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(64, 64)
    optimizer.step()
    moments, scales, maps = 2 * 3 * 64 * 64, 2 * 3 * 16 * 4, 2 * 256 * 4
    assert optimizer_bytes(optimizer) == moments + scales + maps


def test_paged_states_on_a_cpu_are_ordinary_ones_and_it_is_said(tmp_path):
    ends = []
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        module = make(
            llama(),
            adapter=FullFineTuning(),
            optimizer=partial(getattr(bnb, name), lr=1e-2, min_8bit_size=16),
        )
        trainer = make_trainer(tmp_path)
        if name.startswith("Paged"):
            with pytest.warns(UserWarning, match="not supported on CPU. Falling back"):
                trainer.fit(module, in_batches(examples(8), 2))
        else:
            trainer.fit(module, in_batches(examples(8), 2))
        ends.append(trainable(module.model))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


# ---------------------------------------------------------------- small tensors


def log_of(tmp_path, caplog, module):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer = make_trainer(tmp_path, max_steps=3)
        trainer.fit(module, in_batches(examples(8), 2))
    said = [m for m in map(str, (r.getMessage() for r in caplog.records)) if "min_8bit" in m]
    return trainer, said


def test_an_adapter_of_small_factors_is_told_that_nothing_was_packed(tmp_path, caplog):
    """Every factor of the embedded base at rank 8 has fewer than 4096 elements."""
    module = make(llama(), optimizer=partial(bnb.AdamW8bit, lr=1e-3))
    trainer, said = log_of(tmp_path, caplog, module)
    factors = [p for p in module.model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in factors)
    assert trainer.logger["bytes/optimizer"] == [8 * elements]
    [line] = said  # once, whatever the number of steps
    largest = max(p.numel() for p in factors)
    for words in (
        f"AdamW8bit keeps the moments of {len(factors)} of {len(factors)} tensors in fp32",
        f"at most {largest:,}",
        "min_8bit_size=4096",
        "256",
    ):
        assert words in line


def test_a_smaller_min_8bit_size_packs_them(tmp_path, caplog):
    module = make(llama(), optimizer=partial(bnb.AdamW8bit, lr=1e-3, min_8bit_size=64))
    trainer, said = log_of(tmp_path, caplog, module)
    assert not said
    factors = [p for p in module.model.parameters() if p.requires_grad]
    assert min(p.numel() for p in factors) == 64
    scales = sum(math.ceil(p.numel() / 256) for p in factors)
    maps = 2 * 256 * 4
    expected = 2 * (sum(p.numel() for p in factors) + 4 * scales) + maps
    assert trainer.logger["bytes/optimizer"] == [expected]


@pytest.mark.parametrize("factory", [torch.optim.AdamW, bnb.AdamW, bnb.AdamW8bit])
def test_others_and_mostly_packed_ones_are_told_nothing(factory):
    large, small = (torch.nn.Parameter(torch.ones(size)) for size in (5000, 4000))
    optimizer = factory([large, small])
    assert unpacked(optimizer) is None  # before the first step
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert unpacked(optimizer) is None


# ---------------------------------------------------------------- resume


@every_kind
@pytest.mark.parametrize("spec", [LoRA(rank=4), FullFineTuning()], ids=["lora", "full"])
def test_a_resumed_run_ends_to_the_bit_where_an_unbroken_one_does(tmp_path, kind, spec):
    make_optimizer, moments, _ = KINDS[kind]
    small = {"min_8bit_size": 16} if moments else {}

    def fit(steps, ckpt_path=None):
        seed_everything(0, verbose=False)
        module = make(llama(), adapter=spec, optimizer=partial(make_optimizer, **small))
        trainer = make_trainer(tmp_path, max_steps=steps, max_epochs=-1)
        trainer.fit(module, Batches(4), ckpt_path=ckpt_path)
        return trainer, module

    trainer, whole = fit(8)
    states = trainer.optimizers[0].state.values()
    assert {s["state1"].dtype for s in states} == {torch.uint8 if moments else torch.float32}
    size = optimizer_bytes(trainer.optimizers[0])
    trainer, _ = fit(4)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    saved = torch.load(tmp_path / "part.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    trainer, resumed = fit(8, tmp_path / "part.ckpt")
    start, found = trainable(fit(0)[1].model), trainable(resumed.model)
    assert optimizer_bytes(trainer.optimizers[0]) == size
    for name, value in trainable(whole.model).items():
        assert torch.equal(found[name], value), name
        assert not torch.equal(start[name], value), name


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(("least", "bytes_per_moment"), [(256, 1.02), (4096, 4)])
def test_a_class_path_on_the_command_line_trains(tmp_path, least, bytes_per_moment):
    optimizer = ["--model.optimizer=bitsandbytes.optim.PagedAdamW8bit", "--model.optimizer.lr=1e-3"]
    more = [
        f"--model.optimizer.min_8bit_size={least}",
        "--model.adapter.rank=8",
        "--trainer.max_steps=2",
    ]
    run(*fit_arguments(tmp_path, *optimizer, *more, "--trainer.limit_val_batches=0"))
    [metrics] = tmp_path.rglob("metrics.csv")
    header, *lines = (line.split(",") for line in metrics.read_text().splitlines())

    def logged(name):
        [value] = [float(v) for line in lines if (v := line[header.index(name)])]
        return value

    maps = 2 * 256 * 4 if least == 256 else 0
    elements = 2 * logged("parameters/trainable")
    assert logged("bytes/optimizer") - maps == pytest.approx(elements * bytes_per_moment, rel=0.01)
