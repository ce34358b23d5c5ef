"""The LoRA rows of PEFT's own table of custom models, run beside PEFT: numbers, merges, folders."""

# How the 46 are counted. The table in PEFT 0.21.2's tests/test_custom_models.py has 46 rows whose
# config class is LoraConfig, 13 of which set use_dora. (PEFT's main branch has since added a
# pointwise Conv3d, plain and DoRA; it stands in BESIDE.) Layers, sizes, ranks and inputs below are
# ours, not PEFT's: several of its layers are narrower than its rank of 8, which is refused here.
# A row of TABLE is one row of theirs and is covered in one of these ways:
#   24 "parity"  output in both modes, gradients, merge, and the folder both ways equal PEFT's
#                (13 LoRA, 11 DoRA)
#    4 "wrong"   grouped convolutions: PEFT's first factor mixes the groups, so no merged weight
#                exists; ours equals the merged kernel, and neither reads the other's folder
#                (2 LoRA, 2 DoRA)
#    1 "parts"   modules_to_save: outputs, a step of training, merge, and the folder both ways
#    1 "tokens"  trainable_token_indices: PEFT's folder gives its output here or is refused by name
#                (the model is none of Hugging Face's; test_peft_rows.py has those that are)
#    1 "start"   MiCA, another start of a plain LoRA: PEFT's folder gives its output here and back
#   13 "refused" KaSA, VeLoRA, MonteCLoRA, BD-LoRA, lora_bias and target_parameters: PEFT's folder
#                is refused by the name of the setting, and nothing has changed
#    2 "refused" nn.MultiheadAttention: the same, by the name of the type

import json
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_adapters import DoRA, LoRA, attach, load_adapter, merge, save_adapter
from tests.models import base_bytes, shake, snapshot
from tests.reference import close, effective, stored_transposed

peft = pytest.importorskip("peft")
from peft.tuners.lora.config import BdLoraConfig  # noqa: E402

WEIGHTS = "adapter_model.safetensors"
OUR_FIELDS = {field.name for field in fields(LoRA)}
OUR_BIAS = {"none": "none", "lora_only": "adapter", "all": "all"}


def chain(**layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


class Attending(nn.Module):
    """Torch's attention, whose projections are weights that no module's forward reads."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Matrix(nn.Module):
    """A linear map by a bare parameter, in no layer that anybody knows."""

    def __init__(self, inputs: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def convolutional(kind: type[nn.Module], positions: int, **settings: Any) -> nn.Sequential:
    settings = {"in_channels": 8, "out_channels": 16, "kernel_size": 3, **settings}
    head = nn.Linear(settings["out_channels"] * positions, 10)
    return chain(conv=kind(**settings), act=nn.Tanh(), flat=nn.Flatten(), head=head)


LINE, IMAGE, BODY = (4, 8, 7), (4, 8, 6, 5), (2, 8, 4, 3, 5)  # inputs of the convolutions
GROUPS = {"four": 4, "two-padded": 2}
# PEFT 0.21.2 gives its first factor neither dilation nor padding mode.
ODD = {
    "dilated": {"dilation": 2, "padding": 2},
    "same-dilated": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}
KINDS = {"conv1d": (nn.Conv1d, LINE), "conv2d": (nn.Conv2d, IMAGE), "conv3d": (nn.Conv3d, BODY)}

MODELS = {  # how a model is made, and the shape of its input
    "mlp": (
        lambda: chain(up=nn.Linear(10, 16), act=nn.Tanh(), down=nn.Linear(16, 12)),
        (5, 10),
    ),
    "mlp-no-bias": (
        lambda: chain(
            up=nn.Linear(10, 16, bias=False), act=nn.Tanh(), down=nn.Linear(16, 12, bias=False)
        ),
        (5, 10),
    ),
    "layer-norm": (
        lambda: chain(up=nn.Linear(10, 16), norm=nn.LayerNorm(16), down=nn.Linear(16, 12)),
        (5, 10),
    ),
    "batch-norm": (
        lambda: chain(up=nn.Linear(10, 16), norm=nn.BatchNorm1d(16), down=nn.Linear(16, 12)),
        (5, 10),
    ),
    "words": (
        lambda: chain(table=nn.Embedding(30, 12), mix=Conv1D(9, 12), head=nn.Linear(9, 10)),
        None,
    ),
    "conv1d": (lambda: convolutional(nn.Conv1d, 5), LINE),
    "conv2d": (lambda: convolutional(nn.Conv2d, 12), IMAGE),
    "conv3d": (lambda: convolutional(nn.Conv3d, 6), BODY),
    "conv2d-four": (lambda: convolutional(nn.Conv2d, 12, groups=4), IMAGE),
    "conv2d-two-padded": (lambda: convolutional(nn.Conv2d, 30, groups=2, padding=1), IMAGE),
    "conv2d-strided": (
        lambda: convolutional(nn.Conv2d, 6, kernel_size=(3, 2), stride=(2, 3), padding=(1, 0)),
        IMAGE,
    ),
    "conv2d-same": (lambda: convolutional(nn.Conv2d, 30, padding="same"), IMAGE),
    "conv1d-same": (lambda: convolutional(nn.Conv1d, 7, padding="same", bias=False), LINE),
    "conv2d-pointwise": (lambda: convolutional(nn.Conv2d, 30, kernel_size=1), IMAGE),
    "conv3d-pointwise": (lambda: convolutional(nn.Conv3d, 60, kernel_size=1), BODY),
    **{
        f"{name}-{odd}": (
            lambda kind=kind, shape=shape, odd=odd: convolutional(
                kind, torch.Size(shape[2:]).numel(), **ODD[odd]
            ),
            shape,
        )
        for name, (kind, shape) in KINDS.items()
        for odd in ODD
    },
    "attention": (Attending, (3, 5, 12)),
    "matrix": (lambda: chain(up=Matrix(10, 16), act=nn.Tanh(), down=nn.Linear(16, 12)), (5, 10)),
}


@dataclass(frozen=True)
class Case:
    """One adapter on one model, said in PEFT's words."""

    id: str
    model: str
    theirs: dict[str, Any]
    covered: str = "parity"
    named: str = ""  # what a refusal names

    def base(self) -> nn.Module:
        """The model without adapters, the same at every call, nothing at its usual start value."""
        torch.manual_seed(0)
        model = MODELS[self.model][0]()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # a lost bias of zero would go unseen
                nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
        if isinstance(getattr(model, "norm", None), nn.BatchNorm1d):
            nn.init.normal_(model.norm.running_mean)
            nn.init.uniform_(model.norm.running_var, 0.5, 2)
        return model.eval()

    def input(self) -> Tensor:
        shape, generator = MODELS[self.model][1], torch.Generator().manual_seed(7)
        if shape is None:
            return torch.randint(0, 30, (3, 7), generator=generator)
        return torch.randn(shape, generator=generator)

    def config(self) -> Any:
        return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **self.theirs})

    def spec(self) -> LoRA:
        said = {"r": 4, "lora_alpha": 6, **self.theirs}
        ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        ours |= {"target_modules": "targets", "use_rslora": "rslora"}
        settings = {ours.get(key, key): value for key, value in said.items() if key != "use_dora"}
        if "bias" in settings:
            settings["bias"] = OUR_BIAS[settings["bias"]]
        return (DoRA if said.get("use_dora") else LoRA)(**settings)


def _with_dora(*cases: Case) -> list[Case]:
    dora = [Case(f"{c.id}-dora", c.model, {**c.theirs, "use_dora": True}, c.covered) for c in cases]
    return [*cases, *dora]


UP, DOWN = {"target_modules": ["up"]}, {"target_modules": ["down"]}
BOTH = {"target_modules": ["up", "down"]}
VELORA = {"random": ["up"], "batch_average": ["up", "down"], "batch_average_once": ["up"]}

TABLE = [
    Case("mlp-regex", "mlp", {"target_modules": "up"}),
    Case("mlp-first", "mlp", UP),
    Case("mlp-last", "mlp", DOWN),
    Case("mlp-both", "mlp", BOTH),
    Case("mlp-modules-to-save", "mlp", {**UP, "modules_to_save": ["down"]}, "parts"),
    Case("mlp-dropout", "mlp", {**UP, "lora_alpha": 9, "lora_dropout": 0.1}),
    Case("mlp-first-dora", "mlp", {**UP, "use_dora": True}),
    Case("mlp-both-dora", "mlp", {**BOTH, "use_dora": True}),
    Case("mlp-regex-dora", "mlp", {"target_modules": "down", "use_dora": True, "lora_alpha": 32}),
    Case("kasa", "mlp", {**UP, "kasa_config": peft.KasaConfig()}, "refused", "kasa_config"),
    Case("mica", "mlp", {**UP, "init_lora_weights": "mica"}, "start"),
    *(
        Case(
            f"velora-{start}",
            "mlp",
            {
                "target_modules": names,
                "velora_config": peft.VeloraConfig(num_groups=2, init_type=start),
            },
            "refused",
            "velora_config",
        )
        for start, names in VELORA.items()
    ),
    *_with_dora(
        Case("conv1d-hf", "words", {"target_modules": ["mix"]}),
        Case("embedding", "words", {"target_modules": ["table"]}),
        Case("embedding-and-conv1d-hf", "words", {"target_modules": ["table", "mix"]}),
    ),
    Case(
        "tokens",
        "words",
        {"target_modules": ["mix"], "trainable_token_indices": {"table": [0, 10]}},
        "tokens",
        "token",
    ),
    *_with_dora(
        Case("conv1d", "conv1d", {"target_modules": ["conv"]}),
        Case("conv2d", "conv2d", {"target_modules": ["conv"]}),
        Case("conv2d-and-linear", "conv2d", {"target_modules": ["conv", "head"]}),
        Case("conv2d-groups-four", "conv2d-four", {"target_modules": ["conv"]}, "wrong"),
        Case("conv2d-groups-two", "conv2d-two-padded", {"target_modules": ["conv"]}, "wrong"),
        Case("conv3d", "conv3d", {"target_modules": ["conv"]}),
        Case("conv3d-and-linear", "conv3d", {"target_modules": ["conv", "head"]}),
    ),
    Case("bias-mlp", "mlp", {**BOTH, "lora_bias": True}, "refused", "lora_bias"),
    *(
        Case(
            f"bias-{name}",
            name,
            {"target_modules": ["conv"], "lora_bias": True},
            "refused",
            "lora_bias",
        )
        for name in ("conv2d", "conv3d")
    ),
    Case(
        "attention",
        "attention",
        {"target_modules": ["attention"]},
        "refused",
        "MultiheadAttention",
    ),
    Case(
        "attention-and-linear",
        "attention",
        {"target_modules": ["attention", "head"]},
        "refused",
        "MultiheadAttention",
    ),
    Case(
        "parameter", "matrix", {"target_parameters": ["up.weight"]}, "refused", "target_parameters"
    ),
    Case(
        "parameter-and-layer",
        "mlp",
        {**UP, "target_parameters": ["down.weight"]},
        "refused",
        "target_parameters",
    ),
    Case(
        "monteclora",
        "mlp",
        {**UP, "monteclora_config": peft.MontecloraConfig(num_samples=2)},
        "refused",
        "monteclora_config",
    ),
    *(
        Case(
            f"blocks-{name}",
            "mlp",
            {**BOTH, "use_bdlora": BdLoraConfig(nblocks=2, match_strict=False, **blocks)},
            "refused",
            "use_bdlora",
        )
        for name, blocks in {
            "A": {"target_modules_bd_a": ["up"]},
            "B": {"target_modules_bd_b": ["down"]},
            "both": {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"]},
        }.items()
    ),
]

BESIDE = [  # what the table leaves out
    *_with_dora(
        Case("no-bias", "mlp-no-bias", BOTH),
        Case("rslora", "mlp", {**BOTH, "use_rslora": True}),
        Case("much-dropout", "mlp", {**DOWN, "lora_dropout": 0.6}),
        Case("layer-norm", "layer-norm", BOTH),
        *(
            Case(name, name, {"target_modules": ["conv"]})
            for name in (
                "conv2d-strided",
                "conv2d-same",
                "conv1d-same",
                "conv2d-pointwise",
                "conv3d-pointwise",
            )
        ),
        *(
            Case(f"{name}-{odd}", f"{name}-{odd}", {"target_modules": ["conv"]}, "wrong")
            for name in KINDS
            for odd in ODD
        ),
        *(
            Case(f"{name}-saved", name, {**UP, "modules_to_save": ["norm"]}, "parts")
            for name in ("layer-norm", "batch-norm")
        ),
        Case("two-saved", "layer-norm", {**UP, "modules_to_save": ["norm", "down"]}, "parts"),
        Case("saved-beside-all", "words", {"target_modules": ["mix"], "modules_to_save": ["table"]},
             "parts"),
        *(
            Case(f"bias-{bias}-{name}", name, {"target_modules": names, "bias": bias}, "parts")
            for bias in ("lora_only", "all")
            for name, names in {
                "mlp": ["up"],
                "layer-norm": ["up", "down"],
                "batch-norm": ["down"],
                "words": ["table", "mix"],
                "conv2d": ["conv"],
            }.items()
        ),
    ),
    Case("batch-norm", "batch-norm", BOTH),
    # A magnitude in front of a batch norm has no gradient but rounding: only the layer behind it.
    Case("batch-norm-dora", "batch-norm", {**DOWN, "use_dora": True}),
    *(  # PEFT adapts nothing twice, and writes some biases three times: the same output, or refused
        Case(f"both-{bias}", "mlp", {**BOTH, "modules_to_save": ["down"], "bias": bias}, "tokens",
             "modules_to_save")
        for bias in ("none", "lora_only", "all")
    ),
]  # fmt: skip


def cases(covered: str) -> pytest.MarkDecorator:
    """Parametrise with the cases covered so; those whose setting LoRA lacks are skipped."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.id, marks=_missing(case))
            for case in (*TABLE, *BESIDE)
            if case.covered == covered
        ],
    )


def _missing(case: Case) -> list[pytest.MarkDecorator]:
    lacking = {"modules_to_save", "bias"} & case.theirs.keys() - OUR_FIELDS
    if case.covered != "parts" or not lacking:
        return []
    return [pytest.mark.skip(reason=f"LoRA has no field {' and '.join(sorted(lacking))}")]


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def their_model(case: Case) -> nn.Module:
    base, config = case.base(), case.config()
    return shake(quietly(lambda: peft.get_peft_model(base, config)).eval(), std=0.2)


def from_their_loader(case: Case, folder: Any, trainable: bool = False) -> nn.Module:
    base = case.base()
    return quietly(
        lambda: peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    ).eval()


def their_parts(theirs: nn.Module, name: str) -> dict[str, Tensor]:
    """PEFT's parameters of one layer by our names."""
    layer = theirs.base_model.model.get_submodule(name)
    if "default" in layer.lora_embedding_A:
        factors = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    parts = dict(zip(("lora_A", "lora_B"), factors, strict=True))
    if "default" in layer.lora_magnitude_vector:
        parts["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parts


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Our adapters by the names of their layers."""
    found = {
        name.removesuffix(".adapter"): module
        for name, module in model.named_modules()
        if name.endswith(".adapter")
    }
    assert found
    return found


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, with PEFT's weights in both."""
    theirs, ours = their_model(case), case.base()
    names = attach(ours, case.spec(), seed=0)
    with torch.no_grad():
        for name in names:
            adapter, parts = ours.get_submodule(name).adapter, their_parts(theirs, name)
            assert {n for n, p in adapter.named_parameters() if p.requires_grad} == parts.keys()
            for part, value in parts.items():
                parameter = adapter.get_parameter(part)
                assert parameter.numel() == value.numel()
                assert value.any()
                parameter.copy_(value.reshape(parameter.shape))
    return theirs, ours


def merged_by_hand(case: Case, ours: nn.Module) -> nn.Module:
    """The model with the papers' W' written into each adapted layer, without the library."""
    model = case.base()
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            layer = model.get_submodule(name)
            W = effective(layer, adapter)
            layer.weight.copy_(W.T if stored_transposed(layer) else W.reshape(layer.weight.shape))
    return model


def seeded(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    model.train(training)
    torch.manual_seed(11)  # both draw one mask per adapted layer with dropout
    return model(x)


def objective(y: Tensor) -> Tensor:
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum()


def same_gradient(found: Tensor | None, expected: Tensor, name: str) -> None:
    assert found is not None, name
    assert expected.norm() > 0, name
    error = (found.reshape(expected.shape) - expected).norm()
    assert error <= 1e-5 * expected.norm() + 1e-7, name


def same_state(found: nn.Module, expected: nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def described(folder: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in load_file(folder / WEIGHTS).items()}


def peft_type(folder: Any) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def refused(case: Case, folder: Any, *words: str) -> None:
    """Loading fails in words, and the model has not changed."""
    model = case.base()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        load_adapter(model, folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert snapshot(model) == before


# ---------------------------------------------------------------- the table itself


def test_the_table_has_pefts_46_lora_rows_of_which_13_are_dora():
    assert len(TABLE) == 46
    assert len({case.id for case in (*TABLE, *BESIDE)}) == len(TABLE) + len(BESIDE)
    assert sum(case.theirs.get("use_dora", False) for case in TABLE) == 13
    assert Counter(case.covered for case in TABLE) == {
        "parity": 24,
        "wrong": 4,
        "parts": 1,
        "tokens": 1,
        "start": 1,
        "refused": 15,
    }


# ---------------------------------------------------------------- the same numbers


@pytest.mark.usefixtures("drawn_alike")
@cases("parity")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_outputs_and_gradients_agree(case, training):
    theirs, ours = pair(case)
    x = case.input()
    expected, found = seeded(theirs, x, training), seeded(ours, x, training)
    assert not torch.allclose(expected, seeded(case.base(), x, training), atol=1e-2)
    close(found, expected)
    objective(expected).backward()
    objective(found).backward()
    for name, adapter in adapters(ours).items():
        for part, value in their_parts(theirs, name).items():
            same_gradient(adapter.get_parameter(part).grad, value.grad, f"{name} {part}")
    assert not [n for n, p in ours.named_parameters() if p.grad is not None and "adapter" not in n]


@cases("parity")
def test_merges_agree_with_theirs_and_with_the_papers(case):
    theirs, ours = pair(case)
    x, by_hand = case.input(), merged_by_hand(case, ours)
    before = ours(x)
    same_state(merge(ours), by_hand)
    close(ours(x), before)
    if case.model == "conv3d-pointwise":  # in 0.21.2 it squeezes too few dimensions
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            theirs.merge_and_unload()
    else:
        same_state(ours, quietly(theirs.merge_and_unload))


@cases("parity")
def test_their_folder_gives_their_output_here(case, tmp_path):
    theirs, x = their_model(case), case.input()
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    ours = case.base()
    before = base_bytes(ours)
    names = load_adapter(ours, tmp_path / "theirs")
    assert set(names) == adapters(ours).keys()
    close(ours(x), theirs(x))
    assert base_bytes(ours) == before
    for name, adapter in adapters(ours).items():
        for part, value in their_parts(theirs, name).items():
            assert torch.equal(adapter.get_parameter(part).reshape(value.shape), value), name
    save_adapter(ours, tmp_path / "ours")
    close(from_their_loader(case, tmp_path / "ours")(x), theirs(x))
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@cases("parity")
def test_our_folder_gives_our_output_there(case, tmp_path):
    ours, x = case.base(), case.input()
    attach(ours, case.spec(), seed=0)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    assert peft_type(tmp_path / "ours") == "LORA"
    assert not torch.allclose(ours(x), case.base()(x), atol=1e-2)
    close(from_their_loader(case, tmp_path / "ours")(x), ours(x))
    theirs = their_model(case)
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")


@cases("start")
def test_another_start_of_a_plain_lora_travels_both_ways(case, tmp_path):
    theirs, x = their_model(case), case.input()
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    ours = case.base()
    load_adapter(ours, tmp_path / "theirs")
    assert not torch.allclose(ours(x), case.base()(x), atol=1e-2)
    close(ours(x), theirs(x))
    save_adapter(ours, tmp_path / "ours")
    close(from_their_loader(case, tmp_path / "ours")(x), theirs(x))


# ---------------------------------------------------------------- where PEFT computes another thing


@pytest.mark.usefixtures("drawn_alike")
@cases("wrong")
def test_where_peft_is_wrong_ours_is_the_merged_kernel(case):
    model, x = case.base(), case.input()
    attach(model, case.spec(), seed=0)
    shake(model)
    by_hand = merged_by_hand(case, model)
    for training in (False, True):
        found = seeded(model, x, training)
        assert not torch.allclose(found, case.base()(x), atol=1e-2)
        close(found, by_hand(x))
    merge(model)
    close(model(x), by_hand(x))
    close(model.conv.weight, by_hand.conv.weight)


@cases("wrong")
def test_where_peft_is_wrong_it_refuses_our_folder_by_its_type(case, tmp_path):
    model, x = case.base(), case.input()
    attach(model, case.spec(), seed=0)
    shake(model)
    save_adapter(model, tmp_path)
    assert peft_type(tmp_path) == "LIT_LORA"
    with pytest.raises(KeyError, match="LIT_LORA"):
        from_their_loader(case, tmp_path)
    again = case.base()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


@cases("wrong")
def test_where_peft_is_wrong_its_folder_is_refused_by_layer(case, tmp_path):
    try:
        theirs = their_model(case)
    except RuntimeError as error:
        assert case.theirs.get("use_dora"), error  # noqa: PT017 (its first norm needs a forward)
        pytest.skip(f"PEFT builds no such model: {error}")
    quietly(lambda: theirs.save_pretrained(tmp_path))
    refused(case, tmp_path, "'conv'", "padding mode, dilation")


# ---------------------------------------------------------------- what is refused by name


@cases("refused")
def test_their_folder_of_a_setting_that_is_not_supported_is_refused_by_name(case, tmp_path):
    theirs = their_model(case)
    quietly(lambda: theirs.save_pretrained(tmp_path))
    refused(case, tmp_path, case.named)


@cases("tokens")
def test_their_folder_gives_their_output_or_is_refused_by_name(case, tmp_path):
    theirs, x = their_model(case), case.input()
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours = case.base()
    before = snapshot(ours)
    try:
        load_adapter(ours, tmp_path)
    except ValueError as error:
        assert case.named in str(error)  # noqa: PT017 (refusing is one of two right answers)
        assert snapshot(ours) == before
    else:
        close(ours(x), theirs(x))


UNFIT = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(12, 2),
    "LSTM": lambda: nn.LSTM(12, 12),
    "GRUCell": lambda: nn.GRUCell(12, 12),
    "LayerNorm": lambda: nn.LayerNorm(12),
    "BatchNorm1d": lambda: nn.BatchNorm1d(12),
    "Bilinear": lambda: nn.Bilinear(12, 12, 12),
    "EmbeddingBag": lambda: nn.EmbeddingBag(30, 12),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 12, 3),
    "Matrix": lambda: Matrix(12, 12),
    "Sequential": lambda: nn.Sequential(nn.Linear(12, 12)),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("targets", [["layer"], ["layer", "head"], "layer"])
def test_a_layer_that_cannot_be_adapted_is_refused_by_its_type(kind, method, targets):
    model = chain(layer=UNFIT[kind](), head=nn.Linear(12, 10))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'layer', an? {kind}, which cannot hold a"):
        attach(model, method(rank=2, targets=targets))
    assert snapshot(model) == before


@pytest.mark.parametrize("targets", ["all-linear", "all", ["out_proj", "head"]])
def test_no_adapter_is_put_where_torch_never_calls_the_layer(targets):
    model, x = Attending().eval(), torch.randn(3, 5, 12)
    try:
        attach(model, LoRA(rank=2, targets=targets))
    except ValueError:
        return
    shake(model)
    output = model(x)
    objective(output).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    close(merge(model)(x), output)


# ---------------------------------------------------------------- trained modules and biases


def train_a_step(model: nn.Module, x: Tensor) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    objective(model(x)).backward()
    optimizer.step()
    return model.eval()


@cases("parts")
def test_their_trained_parts_come_here_and_go_back(case, tmp_path):
    theirs, x = their_model(case), case.input()
    if "norm" in case.theirs.get("modules_to_save", []):
        with torch.no_grad():
            theirs.train()(x)  # the statistics of a copied batch norm move, and are saved
        theirs.eval()
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    ours = case.base()
    load_adapter(ours, tmp_path / "theirs")
    close(ours.eval()(x), theirs(x))
    save_adapter(ours, tmp_path / "ours")
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
    close(from_their_loader(case, tmp_path / "ours")(x), theirs(x))


@cases("parts")
def test_our_trained_parts_go_there(case, tmp_path):
    ours, x = case.base(), case.input()
    attach(ours, case.spec(), seed=0)
    close(ours(x), case.base()(x), 1e-6)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    close(from_their_loader(case, tmp_path / "ours")(x), ours(x))
    theirs = their_model(case)
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert config.bias == case.theirs.get("bias", "none")
    again = case.base()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.eval()(x), ours(x))


@cases("parts")
def test_trained_parts_get_their_gradients(case, tmp_path):
    """A step of training from one folder leaves both with one output and one file."""
    theirs, x = their_model(case), case.input()
    quietly(lambda: theirs.save_pretrained(tmp_path / "start"))
    ours = case.base()
    load_adapter(ours, tmp_path / "start")
    started = ours.eval()(x).detach()
    theirs = train_a_step(from_their_loader(case, tmp_path / "start", trainable=True), x)
    train_a_step(ours, x)
    assert not torch.allclose(ours(x), started, atol=1e-3)
    save_adapter(ours, tmp_path / "ours")
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    found, expected = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)


@cases("parts")
def test_merging_takes_trained_parts_along(case, tmp_path):
    theirs, x = their_model(case), case.input()
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours = case.base()
    load_adapter(ours, tmp_path)
    before = ours.eval()(x)
    same_state(merge(ours), quietly(theirs.merge_and_unload))
    close(ours(x), before)
