"""Convolutions: the low-rank branch is the convolution by the merged kernel, in all its settings.

Oracle: torch's own layer with the dense kernel W + s B A (or DoRA's W') in place of its weight.
PEFT is one only without dilation, groups and padding modes, where it is right.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lit_adapters import (
    DoRA,
    LoRA,
    OLoRA,
    PiSSA,
    attach,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from tests.models import base_bytes, shake, shape_of
from tests.reference import OneLayer, close, dora, effective, inputs, matrix, product, run

SETTINGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2},
    "same-dilated": {"padding": "same", "dilation": 2},
    "groups": {"groups": 2},
    "groups-4": {"groups": 4, "bias": False},
    "stride-padding-dilation-groups": {"stride": 2, "padding": 1, "dilation": 2, "groups": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular-same-dilated-groups": {
        "padding": "same",
        "dilation": 2,
        "groups": 2,
        "padding_mode": "circular",
    },
    "reflect-strided": {"padding": 2, "stride": 2, "padding_mode": "reflect"},
    "even-kernel-same": {"kernel_size": 4, "padding": "same"},
    "pointwise": {"kernel_size": 1},
}
ONLY_2D = {
    "oblong": {
        "kernel_size": (3, 1),
        "stride": (1, 2),
        "padding": (1, 0),
        "dilation": (2, 1),
    },
    "oblong-circular": {
        "kernel_size": (2, 3),
        "padding": (1, 2),
        "padding_mode": "circular",
        "groups": 2,
    },
}
DEPTHWISE = {"groups": 8, "out_channels": 16}
RIGHT_IN_PEFT = ["plain", "no-bias", "stride", "padding", "pointwise", "valid"]
SPECS = {"lora": LoRA, "dora": DoRA}

CASES = [
    *[(nn.Conv1d, name, settings) for name, settings in SETTINGS.items()],
    *[(nn.Conv2d, name, settings) for name, settings in {**SETTINGS, **ONLY_2D}.items()],
]
IDS = [f"{kind.__name__}-{name}" for kind, name, _ in CASES]
every_convolution = pytest.mark.parametrize("case", CASES, ids=IDS)
every_method = pytest.mark.parametrize("method", SPECS)


def stock_layer(case):
    kind, _, settings = case
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: an even kernel and "same" copy the input
        return kind(**{"in_channels": 8, "out_channels": 12, "kernel_size": 3, **settings})


def convolved(case, method, shaken=True, start=None, dtype=torch.float32, **settings):
    """The model with its adapter, and the layer as it was."""
    model = OneLayer(stock_layer(case).to(dtype)).eval()
    stock = copy.deepcopy(model.layer)
    spec = {"rank": 2, "alpha": 3, "targets": ["layer"], **settings}
    attach(model, SPECS[method](**spec), seed=0)
    if start is not None:
        initialise(model, start)
    return (shake(model) if shaken else model), stock


@pytest.fixture(autouse=True)
def _even_kernels():
    """Torch warns that "same" with an even kernel makes a copy of the input."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        yield


# ---------------------------------------------------------------- check 13: branch = merged kernel


@every_convolution
@every_method
@pytest.mark.parametrize("start", [None, PiSSA(niter=None)], ids=["kaiming", "pissa"])
def test_the_branch_is_the_convolution_by_the_merged_kernel(case, method, start):
    model, stock = convolved(case, method, start=start)
    W, x = effective(stock, model.layer.adapter), inputs(stock)
    assert (W - matrix(stock)).norm() > 0.1 * matrix(stock).norm()
    before = model(x)
    close(before, run(stock, W, x))
    merge(model)
    close(matrix(model.layer), W)
    close(model(x), before)
    assert shape_of(model) == shape_of(OneLayer(stock))


@every_convolution
@every_method
def test_shapes_are_two_dimensional_and_hold_one_pair_per_group(case, method):
    model, stock = convolved(case, method)
    adapter, inner = model.layer.adapter, stock.weight[0].numel()
    assert adapter.lora_A.shape == (2 * stock.groups, inner)
    assert adapter.lora_B.shape == (12, 2)
    assert adapter.scale == pytest.approx(1.5)
    if method == "dora":
        assert adapter.magnitude.shape == (12,)


@every_convolution
@every_method
def test_gradients_are_those_through_the_dense_kernel(case, method):
    model, stock = convolved(case, method)
    adapter = model.layer.adapter
    mine, yours = (inputs(stock).requires_grad_() for _ in range(2))
    y = model(mine)
    T = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * T).sum().backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    W = matrix(stock) + 1.5 * product(leaves["lora_A"], leaves["lora_B"], stock.groups)
    if method == "dora":
        W = dora(W, leaves["magnitude"])
    (run(stock, W, yours) * T).sum().backward()
    for name, leaf in leaves.items():
        found = adapter.get_parameter(name).grad
        assert (found - leaf.grad).norm() <= 1e-5 * leaf.grad.norm(), name
    assert (mine.grad - yours.grad).norm() <= 1e-5 * yours.grad.norm()


@every_convolution
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_output_to_the_bit(case, method, dtype):
    for start in (None, PiSSA(niter=None), OLoRA()):
        model, stock = convolved(case, method, shaken=False, start=start, dtype=dtype)
        x = inputs(stock)
        assert torch.equal(model(x), stock(x)), start


@every_method
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_depthwise_convolution_takes_rank_one(kind, method):
    case = (kind, "depthwise", DEPTHWISE)
    model, stock = convolved(case, method, rank=1)
    x = inputs(stock)
    before = model(x)
    close(before, run(stock, effective(stock, model.layer.adapter), x))
    close(merge(model)(x), before)


@pytest.mark.parametrize(("groups", "limit"), [(1, 12), (4, 3), (8, 2)])
def test_the_rank_is_limited_by_one_groups_kernel(groups, limit):
    def layer():
        return OneLayer(nn.Conv2d(8, 12 if groups < 8 else 16, 3, groups=groups))

    attach(layer(), LoRA(rank=limit, targets=["layer"]))
    with pytest.raises(ValueError, match=f"rank.*{limit + 1}"):
        attach(layer(), LoRA(rank=limit + 1, targets=["layer"]))


@every_method
@pytest.mark.parametrize("start", [None, OLoRA()], ids=["kaiming", "olora"])
def test_three_dimensional_convolutions_too(method, start):
    model = OneLayer(nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 0), dilation=(1, 2, 1), groups=2))
    stock, x = copy.deepcopy(model.layer), torch.randn(2, 4, 5, 7, 4)
    attach(model, SPECS[method](rank=2, alpha=3, targets=["layer"]))
    if start:
        initialise(model, start)
    shake(model)
    before = model(x)
    close(before, run(stock, effective(stock, model.layer.adapter), x))
    close(merge(model)(x), before)


# ---------------------------------------------------------------- inputs of other forms


@every_convolution
@every_method
def test_an_unbatched_input_gives_the_batchs_row(case, method):
    model, stock = convolved(case, method)
    x = inputs(stock)
    close(model(x[1]), model(x)[1], 1e-6)


@every_method
@pytest.mark.parametrize("start", [None, PiSSA(niter=None)], ids=["kaiming", "pissa"])
@pytest.mark.parametrize("settings", ["padding", "groups", "circular"])
def test_channels_last_changes_nothing_but_the_memory_format(method, start, settings):
    case = (nn.Conv2d, settings, SETTINGS[settings])
    model, stock = convolved(case, method, start=start)
    x = inputs(stock)
    expected = model(x)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert wide.layer.weight.is_contiguous(memory_format=torch.channels_last)
    found = wide(x.contiguous(memory_format=torch.channels_last))
    close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    merge(wide)
    assert wide.layer.weight.is_contiguous(memory_format=torch.channels_last)
    close(wide(x), expected)


@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("settings", ["padding", "groups", "circular", "same-dilated"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_dropout_drops_the_input_of_the_branch(settings, kind):
    model, stock = convolved((kind, settings, SETTINGS[settings]), "lora", dropout=0.5)
    adapter, x = model.layer.adapter, inputs(stock)
    torch.manual_seed(7)
    found = model.train()(x)
    torch.manual_seed(7)
    branch = 1.5 * product(adapter.lora_A, adapter.lora_B, stock.groups)
    zero = run(stock, torch.zeros_like(branch), x)  # the bias alone
    close(found, stock(x) + run(stock, branch, F.dropout(x, 0.5)) - zero)


# ---------------------------------------------------------------- refusals and precision


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@every_method
def test_transposed_convolutions_are_refused_by_name(kind, method):
    model = OneLayer(kind(4, 6, 3))
    before = shape_of(model)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=kind.__name__):
        attach(model, SPECS[method](rank=2, targets=["layer"]))
    assert shape_of(model) == before


@pytest.mark.parametrize("settings", ["padding", "groups"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_merge_in_bf16_adds_in_fp32_and_rounds_once(settings, kind):
    torch.manual_seed(0)
    fields = {"kernel_size": 5, **SETTINGS[settings]}
    model = OneLayer(kind(64, 48, **fields)).bfloat16()
    stock = copy.deepcopy(model.layer)
    attach(model, LoRA(rank=2, alpha=3, targets=["layer"]))
    shake(model)
    A, B = (p.detach().double() for p in (model.layer.adapter.lora_A, model.layer.adapter.lora_B))
    exact = matrix(stock).double() + 1.5 * product(A, B, stock.groups)
    merge(model)
    assert model.layer.weight.dtype == torch.bfloat16
    wrong = model.layer.weight.detach().flatten(1) != exact.to(torch.bfloat16)
    assert wrong.double().mean().item() < 0.005  # ties only


@every_method
def test_a_convolution_trains_and_its_kernel_stays(method):
    model, stock = convolved((nn.Conv2d, "groups", SETTINGS["groups"]), method, shaken=False)
    x, before = inputs(stock), base_bytes(model)
    target = run(stock, matrix(stock) + 0.3 * torch.randn(matrix(stock).shape), x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert base_bytes(model) == before


# ---------------------------------------------------------------- files


@every_convolution
@every_method
@pytest.mark.parametrize("start", [None, PiSSA(niter=None)], ids=["kaiming", "pissa"])
def test_our_folder_comes_back_here_to_the_bit(case, method, start, tmp_path):
    model, stock = convolved(case, method, start=start)
    save_adapter(model, tmp_path)
    again = OneLayer(stock_layer(case)).eval()
    load_adapter(again, tmp_path)
    x = inputs(stock)
    assert torch.equal(again(x), model(x))
    found, expected = dict(again.named_parameters()), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


peft = pytest.importorskip("peft")

shared = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[1] in RIGHT_IN_PEFT],
    ids=[name for case, name in zip(CASES, IDS, strict=True) if case[1] in RIGHT_IN_PEFT],
)


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def peft_model(case, method):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=method == "dora")
    return shake(quietly(lambda: peft.get_peft_model(OneLayer(stock_layer(case)), config)).eval())


def their_parts(model, method):
    layer = model.base_model.model.layer
    parts = {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
    }
    if method == "dora":
        parts["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parts


@shared
@every_method
def test_forward_gradients_and_merge_agree_with_peft(case, method):
    theirs, (ours, stock) = peft_model(case, method), convolved(case, method, shaken=False)
    adapter, x = ours.layer.adapter, inputs(stock)
    parts = their_parts(theirs, method)
    with torch.no_grad():
        for name, value in parts.items():
            parameter = adapter.get_parameter(name)
            parameter.copy_(value.reshape(parameter.shape))
    expected, found = theirs(x), ours(x)
    assert not torch.allclose(expected, stock(x), atol=1e-2)
    close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, value in parts.items():
        grad = adapter.get_parameter(name).grad.reshape(value.shape)
        assert (grad - value.grad).norm() <= 1e-5 * value.grad.norm(), name
    merge(ours)
    close(ours.layer.weight, quietly(theirs.merge_and_unload).layer.weight)


@shared
@every_method
@pytest.mark.parametrize("start", [None, PiSSA(niter=None)], ids=["kaiming", "pissa"])
def test_peft_loads_our_folder(case, method, start, tmp_path):
    ours, stock = convolved(case, method, start=start)
    save_adapter(ours, tmp_path)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(OneLayer(stock), tmp_path)).eval()
    x = inputs(stock_layer(case))
    close(theirs(x), ours(x))
    rank = 2 if start is None else 4
    kernel = stock_layer(case).weight.shape
    shapes = {
        key.removeprefix("base_model.model.layer."): value.shape
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    ones = (1,) * (len(kernel) - 2)
    expected = {"lora_A.weight": (rank, *kernel[1:]), "lora_B.weight": (12, rank, *ones)}
    if method == "dora":
        expected["lora_magnitude_vector"] = (1, 12, *ones)
    assert shapes == expected


@shared
@every_method
def test_we_load_their_folder(case, method, tmp_path):
    theirs, x = peft_model(case, method), inputs(stock_layer(case))
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours = OneLayer(stock_layer(case))
    load_adapter(ours, tmp_path)
    close(ours.eval()(x), theirs(x))
    save_adapter(ours, tmp_path / "ours")
    again = quietly(
        lambda: peft.PeftModel.from_pretrained(OneLayer(stock_layer(case)), tmp_path / "ours")
    )
    close(again.eval()(x), theirs(x))


wrong_in_peft = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[1] not in RIGHT_IN_PEFT],
    ids=[name for case, name in zip(CASES, IDS, strict=True) if case[1] not in RIGHT_IN_PEFT],
)
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
UNKNOWN_TO_PEFT = KeyError  # what PEFT raises for a method that it does not have


@wrong_in_peft
@every_method
def test_where_peft_computes_something_else_it_never_gets_a_folder_of_ours_silently(
    case, method, tmp_path
):
    """Refused here, refused there, or the same output: a silent other result is none of them."""
    ours, stock = convolved(case, method)
    x = inputs(stock)
    try:
        save_adapter(ours, tmp_path)
        theirs = quietly(lambda: peft.PeftModel.from_pretrained(OneLayer(stock), tmp_path)).eval()
        found = theirs(x)
    except (*REFUSALS, UNKNOWN_TO_PEFT):
        return
    close(found, ours(x))


@wrong_in_peft
@every_method
def test_where_peft_computed_something_else_we_never_load_its_folder_silently(
    case, method, tmp_path
):
    x, ours = inputs(stock_layer(case)), OneLayer(stock_layer(case)).eval()
    try:
        theirs = peft_model(case, method)
        expected = theirs(x)
    except REFUSALS:
        return  # no such model of theirs
    quietly(lambda: theirs.save_pretrained(tmp_path))
    try:
        load_adapter(ours, tmp_path)
    except REFUSALS:
        return
    close(ours(x), expected)
