"""DoRA (arXiv:2402.09353): W' = m V / ||V||, V = W + s B A, against plain tensors and PEFT."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_adapters import (
    DoRA,
    Gaussian,
    Kaiming,
    MiLoRA,
    OLoRA,
    PiSSA,
    attach,
    detach,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from tests.models import base_bytes, batch, gpt2, llama, logits, shake, shape_of, trainable
from tests.reference import (
    LAYERS,
    OneLayer,
    close,
    dora,
    effective,
    inputs,
    matrix,
    one_layer,
    product,
    run,
)

peft = pytest.importorskip("peft")

STARTS = {
    "kaiming": Kaiming(),
    "gaussian": Gaussian(),
    "pissa": PiSSA(niter=None),
    "pissa-niter": PiSSA(niter=4),
    "olora": OLoRA(),
    "milora": MiLoRA(),
}
PINNED = ["pissa", "olora", "milora"]
DENSE = ["linear", "linear-no-bias", "conv1d-hf"]

every_layer = pytest.mark.parametrize("kind", LAYERS)
every_start = pytest.mark.parametrize("start", STARTS)


def adapted(kind, start="kaiming", shaken=True, dtype=torch.float32, **settings):
    """The model with its adapter, and the layer as it was."""
    model = one_layer(kind).to(dtype)
    stock = copy.deepcopy(model.layer)
    attach(model, DoRA(**{"rank": 3, "alpha": 5, "targets": ["layer"], **settings}), seed=0)
    initialise(model, STARTS[start], seed=0)
    return (shake(model) if shaken else model), stock


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# ---------------------------------------------------------------- forward


@every_layer
@pytest.mark.parametrize("start", ["kaiming", *PINNED])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_is_the_equation(kind, start, rslora):
    model, stock = adapted(kind, start, rslora=rslora)
    adapter, x = model.layer.adapter, inputs(stock)
    assert adapter.scale == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)
    W = effective(stock, adapter)
    assert (W - matrix(stock)).norm() > 0.1 * matrix(stock).norm()  # shaken enough to be heard
    close(model(x), run(stock, W, x))


def test_the_norm_is_of_an_output_row_not_of_a_column():
    model, stock = adapted("linear")
    adapter, x = model.layer.adapter, inputs(stock)
    V = matrix(stock) + adapter.scale * product(adapter.lora_A, adapter.lora_B)
    by_column = torch.ones(V.shape[1]) * V / V.norm(dim=0)
    assert adapter.magnitude.shape == (12,)
    assert not torch.allclose(model(x), run(stock, by_column, x), atol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "conv1d-hf", "conv2d-groups"])
def test_the_bias_is_not_scaled(kind):
    model, stock = adapted(kind)
    with torch.no_grad():
        model.layer.adapter.magnitude.zero_()
    found = model(inputs(stock))
    bias = stock.bias if found.shape[-1] == 12 else stock.bias[:, None, None]
    close(found, bias.expand_as(found))


@pytest.mark.parametrize("kind", ["linear", "conv2d-groups", "embedding"])
def test_a_negative_magnitude_turns_its_row(kind):
    model, stock = adapted(kind)
    with torch.no_grad():
        model.layer.adapter.magnitude[::2].neg_()
    x = inputs(stock)
    close(model(x), run(stock, effective(stock, model.layer.adapter), x))


def shrunk(share):
    """V = share * W: the adapter has eaten the rest. Its W' is m W / ||W||, whatever the share."""
    model, stock = adapted("linear", "pissa", shaken=False, rank=12, alpha=12)
    with torch.no_grad():
        model.layer.adapter.lora_B.mul_(share)
    x = inputs(stock)
    return model(x), stock(x)


def test_the_norm_is_right_where_nine_tenths_of_a_row_cancel():
    found, expected = shrunk(0.1)
    close(found, expected, 1e-4)


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4, 0.0])
def test_a_row_that_nearly_cancels_is_never_blown_up(share):
    """||V|| is known to fp32 only relative to ||W||; a norm lost in rounding must not divide."""
    found, expected = shrunk(share)
    assert torch.isfinite(found).all()
    assert found.abs().max() < 10 * expected.abs().max()


@pytest.mark.parametrize("start", ["kaiming", "pissa", "olora"])
def test_a_row_of_zeros_stays_zero_and_has_finite_gradients(start):
    model = one_layer("linear")
    with torch.no_grad():
        model.layer.weight[3] = 0
    x = inputs(model.layer)
    before = model(x)
    attach(model, DoRA(rank=3, alpha=5, targets=["layer"]), seed=0)
    initialise(model, STARTS[start])
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


# ---------------------------------------------------------------- start


@every_layer
@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_start_is_the_base_to_the_bit(kind, start, dtype):
    model, stock = adapted(kind, start, shaken=False, dtype=dtype)
    x = inputs(stock)
    assert torch.equal(model(x), stock(x))
    assert torch.equal(model.train()(x), stock(x))


@every_layer
@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_magnitude_starts_as_the_row_norms_of_the_base(kind, start, dtype):
    model, stock = adapted(kind, start, shaken=False, dtype=dtype)
    magnitude = model.layer.adapter.magnitude
    assert magnitude.dtype == torch.float32
    assert magnitude.requires_grad
    close(magnitude, matrix(stock).norm(dim=1), 1e-6)


def test_initialising_again_sets_the_magnitude_again():
    model, stock = adapted("linear")
    x = inputs(stock)
    assert not torch.allclose(model(x), stock(x), atol=1e-2)
    initialise(model, PiSSA(niter=None))
    assert torch.equal(model(x), stock(x))


# ---------------------------------------------------------------- check 11: merge and gradients


@every_layer
@pytest.mark.parametrize("start", ["kaiming", *PINNED])
def test_row_norms_after_merging_are_the_magnitudes(kind, start):
    model, stock = adapted(kind, start)
    magnitude = model.layer.adapter.magnitude.detach().clone()
    assert (magnitude - matrix(stock).norm(dim=1)).abs().max() > 0.1
    merge(model)
    close(matrix(model.layer).norm(dim=1), magnitude.abs())


@every_layer
@pytest.mark.parametrize("start", ["kaiming", *PINNED])
def test_merging_keeps_the_output_and_leaves_a_stock_layer(kind, start):
    model, stock = adapted(kind, start)
    x = inputs(stock)
    before, expected = model(x), effective(stock, model.layer.adapter)
    merge(model)
    close(matrix(model.layer), expected)
    close(model(x), before)
    assert shape_of(model) == shape_of(OneLayer(stock))


def gradients_of_reference(stock, adapter, x, T, **settings):
    """Autograd through the dense W' (out, in)."""
    leaves = {
        name: p.detach().clone().requires_grad_()
        for name, p in adapter.named_parameters()
        if p.requires_grad
    }
    A, B, m = leaves["lora_A"], leaves["lora_B"], leaves["magnitude"]
    groups, origin = getattr(stock, "groups", 1), 0
    if adapter.lora_A0 is not None:
        origin = product(adapter.lora_A0, adapter.lora_B0, groups)
    V = matrix(stock) + adapter.scale * (product(A, B, groups) - origin)
    loss = (run(stock, dora(V, m, **settings), x) * T).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@every_layer
@pytest.mark.parametrize("start", ["kaiming", *PINNED])
def test_gradients_are_those_of_the_equation_with_a_constant_norm(kind, start):
    model, stock = adapted(kind, start)
    adapter, x = model.layer.adapter, inputs(stock)
    y = model(x)
    T = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * T).sum().backward()
    constant = gradients_of_reference(stock, adapter, x, T)
    moving = gradients_of_reference(stock, adapter, x, T, detached=False)
    assert constant.keys() == {"lora_A", "lora_B", "magnitude"}
    for name, expected in constant.items():
        found = adapter.get_parameter(name).grad
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name
    wrong = moving["lora_B"] - constant["lora_B"]
    assert wrong.norm() > 0.1 * constant["lora_B"].norm()  # the check tells the two apart


def test_gradients_in_closed_form():
    model, stock = adapted("linear")
    adapter, x = model.layer.adapter, inputs(stock)
    T = torch.randn(3, 7, 12)
    (model(x) * T).sum().backward()
    g = T.flatten(0, 1).T @ x.flatten(0, 1)  # dL/dW' (out, in)
    A, B, m = (adapter.get_parameter(n).detach() for n in ("lora_A", "lora_B", "magnitude"))
    V = matrix(stock) + adapter.scale * B @ A
    norm = V.norm(dim=1)
    dV = (m / norm)[:, None] * g
    for name, expected in {
        "magnitude": (g * V).sum(1) / norm,
        "lora_B": adapter.scale * dV @ A.T,
        "lora_A": adapter.scale * B.T @ dV,
    }.items():
        found = adapter.get_parameter(name).grad
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "embedding"])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_gradients_reach_the_input(kind, start):
    model, stock = adapted(kind, start)
    mine, yours = (inputs(stock).requires_grad_() for _ in range(2))
    W = effective(stock, model.layer.adapter).detach()
    model(mine).square().sum().backward()
    run(stock, W, yours).square().sum().backward()
    assert (mine.grad - yours.grad).norm() <= 1e-5 * yours.grad.norm()


# ---------------------------------------------------------------- dropout


@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_with_dropout_the_scaled_base_term_sees_the_dropped_input_too(kind, start):
    model, stock = adapted(kind, start, dropout=0.5)
    adapter, x = model.layer.adapter, inputs(stock)
    torch.manual_seed(7)
    found = model.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    W, BA = matrix(stock), product(adapter.lora_A, adapter.lora_B)
    if adapter.lora_A0 is not None:
        W = W - adapter.scale * product(adapter.lora_A0, adapter.lora_B0)  # the residual is frozen
    ratio = adapter.magnitude / (W + adapter.scale * BA).norm(dim=1)
    expected = run(stock, W, x)
    expected = expected + (ratio - 1) * (dropped @ W.T) + ratio * adapter.scale * (dropped @ BA.T)
    close(found, expected)
    assert not torch.allclose(found, model.eval()(x), atol=1e-2)


@pytest.mark.parametrize("kind", DENSE)
def test_dropout_does_not_act_at_the_start(kind):
    """m / ||V|| - 1 is 0 and B A is 0, so that a dropped input changes nothing."""
    model, stock = adapted(kind, shaken=False, dropout=0.5)
    x = inputs(stock)
    assert torch.equal(model.train()(x), stock(x))


# ---------------------------------------------------------------- bf16 base


@every_layer
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_on_a_bf16_base_the_branch_is_exact_up_to_the_base_outputs_rounding(kind, start):
    model, stock = adapted(kind, start, dtype=torch.bfloat16)
    x = inputs(stock)
    found = model(x)
    wide = copy.deepcopy(stock).float()
    exact = run(
        wide, effective(stock, model.layer.adapter), x if x.dtype == torch.long else x.float()
    )
    assert found.dtype == torch.bfloat16
    # base output and result are rounded once each; 2**-8 is half a unit of bf16's last place
    room = 2**-8 * (stock(x).float().abs() * 4 + exact.abs() * 2) + 1e-3
    assert ((found.float() - exact).abs() <= room).all()


def test_a_bf16_base_trains_fp32_masters():
    model = llama().bfloat16()
    attach(model, DoRA(rank=4, alpha=8), seed=0)
    before = base_bytes(model)
    masters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in masters} == {torch.float32}
    first = model(**batch()).loss.item()
    optimizer = torch.optim.AdamW(masters, lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert model(**batch()).loss.item() < first - 0.1
    assert base_bytes(model) == before


# ---------------------------------------------------------------- memory


class Made(TorchDispatchMode):
    """Remembers the size of every tensor that an operation makes (views of old ones left out)."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_never_makes_a_tensor_of_the_weights_size(start, dropout):
    out, wide, tokens = 192, 160, 4
    model = OneLayer(nn.Linear(wide, out))
    attach(model, DoRA(rank=4, alpha=8, dropout=dropout, targets=["layer"]), seed=0)
    initialise(model, STARTS[start])
    shake(model).train()
    with Made() as made:
        model(torch.randn(tokens, wide)).sum().backward()
    assert 0 < made.largest < out * wide, f"{made.largest} elements, the weight has {out * wide}"
    with Made() as dense:
        V = model.layer.weight + model.layer.adapter.lora_B @ model.layer.adapter.lora_A
        V.norm(dim=1)
    assert dense.largest == out * wide  # the probe sees the dense way


# ---------------------------------------------------------------- parity with PEFT


class Body(nn.Module):
    """An embedding and two convolutions without groups or dilation: what PEFT gets right."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 6)
        self.conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.head = nn.Conv2d(10, 7, (1, 2), bias=False)

    def forward(self, ids):
        image = self.tokens(ids).permute(0, 3, 1, 2)
        return self.head(torch.tanh(self.conv(image)))


def body():
    torch.manual_seed(5)
    return Body().eval()


def picture(seed=0):
    return torch.randint(0, 50, (2, 8, 9), generator=torch.Generator().manual_seed(seed))


CASES = {
    "llama": (llama, "all-linear", {"task_type": "CAUSAL_LM"}),
    "llama-embedding": (llama, ["embed_tokens", "q_proj"], {"task_type": "CAUSAL_LM"}),
    "gpt2": (gpt2, ["c_attn", "c_fc", "c_proj"], {"fan_in_fan_out": True}),
    "convolutions": (body, ["tokens", "conv", "head"], {}),
}
every_case = pytest.mark.parametrize("case", CASES)


def is_body(model):
    return any(isinstance(module, Body) for module in model.modules())


def answer(model):
    if not is_body(model):
        return logits(model)
    with torch.no_grad():
        return model(picture())


def loss(model):
    if not is_body(model):
        return model(**batch()).loss
    return model(picture()).square().sum()


def our_model(case, shaken=False, **settings):
    build, targets, _ = CASES[case]
    model = build()
    attach(model, DoRA(**{"rank": 4, "alpha": 6, "targets": targets, **settings}), seed=0)
    return shake(model, std=0.1) if shaken else model


def their_model(case, **settings):
    build, targets, extra = CASES[case]
    fields = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": targets}
    config = peft.LoraConfig(**{**fields, **extra, **settings})
    return shake(quietly(lambda: peft.get_peft_model(build(), config)).eval(), std=0.1)


def layer_pairs(ours, theirs):
    inner = theirs.base_model.model
    for name, module in ours.named_modules():
        if name.endswith(".adapter"):
            name = name.removesuffix(".adapter")
            yield name, module, inner.get_submodule(name)


def their_parts(layer):
    """PEFT's parameters by our names, in PEFT's shapes."""
    if "default" in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    return {"lora_A": A, "lora_B": B, "magnitude": magnitude}


@torch.no_grad()
def copy_across(ours, theirs):
    count = 0
    for _, adapter, layer in layer_pairs(ours, theirs):
        for name, value in their_parts(layer).items():
            parameter = adapter.get_parameter(name)
            assert parameter.numel() == value.numel()
            parameter.copy_(value.reshape(parameter.shape))
        count += 1
    assert count
    return ours


@every_case
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_agree_with_peft(case, rslora):
    theirs = their_model(case, use_rslora=rslora)
    ours = copy_across(our_model(case, rslora=rslora), theirs)
    expected = answer(theirs)
    assert not torch.allclose(expected, answer(CASES[case][0]()), atol=1e-2)
    close(answer(ours), expected)
    loss(theirs).backward()
    loss(ours).backward()
    for name, adapter, layer in layer_pairs(ours, theirs):
        for part, value in their_parts(layer).items():
            found, wanted = adapter.get_parameter(part).grad, value.grad
            assert wanted.abs().sum() > 0
            error = (found.reshape(wanted.shape) - wanted).norm()
            assert error <= 1e-5 * wanted.norm() + 1e-7, f"{name} {part}"


@every_case
def test_merging_agrees_with_peft(case):
    theirs = their_model(case)
    ours = copy_across(our_model(case), theirs)
    found = merge(ours).state_dict()
    expected = quietly(theirs.merge_and_unload).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_dropout_agrees_with_peft_under_the_same_seed(start):
    """One adapted layer in each model, so that both draw one mask."""
    target = ["layers.1.self_attn.q_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=True,
        target_modules=target,
        lora_dropout=0.5,
        init_lora_weights="pissa" if start == "pissa" else True,
    )
    theirs = quietly(lambda: peft.get_peft_model(llama(), config))
    ours = llama()
    attach(ours, DoRA(rank=4, alpha=6, targets=target, dropout=0.5), seed=0)
    initialise(ours, STARTS[start])
    shake(theirs, std=0.2).train()
    copy_across(ours, theirs).train()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(11)
        outputs.append(logits(model))
    assert not torch.allclose(outputs[0], logits(theirs.eval()), atol=1e-3)
    close(outputs[1], outputs[0])


# ---------------------------------------------------------------- folders, both ways


@every_case
def test_peft_loads_our_folder(case, tmp_path):
    ours = our_model(case, shaken=True)
    expected = answer(ours)
    save_adapter(ours, tmp_path)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path)).eval()
    close(answer(theirs), expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    keys = load_file(tmp_path / "adapter_model.safetensors")
    magnitudes = [key for key in keys if key.endswith(".lora_magnitude_vector")]
    assert len(magnitudes) == len(list(layer_pairs(ours, theirs)))


@every_case
def test_our_folder_has_their_keys_and_shapes(case, tmp_path):
    save_adapter(our_model(case, shaken=True), tmp_path / "ours")
    theirs = their_model(case)
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False))
    found, expected = (
        {k: v.shape for k, v in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    )
    assert found == expected


@every_case
def test_we_load_their_folder(case, tmp_path):
    theirs = their_model(case)
    expected = answer(theirs)
    quietly(lambda: theirs.save_pretrained(tmp_path, save_embedding_layers=False))
    ours = CASES[case][0]()
    load_adapter(ours, tmp_path)
    close(answer(ours.eval()), expected)
    assert {n.rsplit(".", 1)[-1] for n in trainable(ours)} == {"lora_A", "lora_B", "magnitude"}


@every_case
@pytest.mark.parametrize("start", [None, "pissa"])
def test_our_folder_comes_back_here_to_the_bit(case, start, tmp_path):
    ours = our_model(case)
    if start:
        initialise(ours, STARTS[start])
    shake(ours, std=0.1)
    save_adapter(ours, tmp_path)
    again = CASES[case][0]()
    load_adapter(again, tmp_path)
    assert torch.equal(answer(again.eval()), answer(ours))
    found, expected = dict(again.named_parameters()), dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@every_case
@pytest.mark.parametrize("start", PINNED)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_pinned_start_travels_to_peft_as_dora_of_twice_the_rank(case, start, rslora, tmp_path):
    ours = our_model(case, rslora=rslora)
    initialise(ours, STARTS[start])
    expected = answer(shake(ours, std=0.1))
    save_adapter(ours, tmp_path)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path)).eval()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] == pytest.approx(6 * (2**0.5 if rslora else 2))
    close(answer(theirs), expected)


@pytest.mark.parametrize("case", ["llama", "convolutions"])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_detach_gives_the_base_back(case, start):
    ours = our_model(case)
    initialise(ours, STARTS[start])
    shake(ours)
    stock = CASES[case][0]()
    detach(ours)
    assert torch.equal(answer(ours), answer(stock))
    assert shape_of(ours) == shape_of(stock)
