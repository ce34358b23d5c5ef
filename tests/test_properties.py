"""What holds for every model, target, rank, method, start and dtype: drawn, not chosen.

Cases are valid by construction: patterns are built from names that the model has, ranks from the
sizes of the layers that they mean. The oracle of matching, ranks and matrices is written here from
the documented rules, and nothing of it comes from the library.
"""

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_adapters import (
    DoRA,
    Gaussian,
    LoRA,
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
from tests.models import (
    BUILDERS,
    base_bytes,
    fingerprint,
    logits,
    shake,
    shape_of,
    snapshot,
    trainable,
)
from tests.reference import matrix, product

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # nothing is left in the tree

QUICK = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DEEP = settings(QUICK, derandomize=False, max_examples=1000, print_blob=True)
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
STARTS = [None, Gaussian(), PiSSA(), PiSSA(niter=None), OLoRA(), MiLoRA()]
PINNED = (PiSSA, OLoRA, MiLoRA)
DIVIDES_BY_ALPHA = (PiSSA, MiLoRA)
# Unit roundoff of a weight's dtype, and how far outputs may be from each other, in units of the
# largest output, beyond what the model makes of roundings.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FAR = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


class Layers(nn.Module):
    """Layers side by side, each with inputs of its own."""

    def __init__(self, layers: list[nn.Module], inputs: list[Tensor]):
        super().__init__()
        names = ("proj", "in_proj")  # one ends like the other, but not after a dot
        self.blocks = nn.ModuleList(
            nn.ModuleDict({names[number % 2]: layer}) for number, layer in enumerate(layers)
        )
        self.samples = inputs

    def forward(self):
        weights = [layer.weight for block in self.blocks for layer in block.values()]
        outputs = [
            layer(x if isinstance(layer, nn.Embedding) else x.to(layer.weight.dtype))
            for block, x in zip(self.blocks, self.samples, strict=True)
            for layer in block.values()
        ]
        assert all(y.dtype == w.dtype for y, w in zip(outputs, weights, strict=True))
        return torch.cat([output.flatten() for output in outputs])


@dataclass(frozen=True)
class Case:
    """A base, what is attached to it, and the names that this means."""

    said: str
    stock: nn.Module
    spec: LoRA
    start: object
    dtype: torch.dtype
    seed: int
    names: tuple[str, ...]

    def __repr__(self):
        return f"{self.said} {self.dtype} seed={self.seed} {self.spec!r} {self.start!r}"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def base(self):
        return copy.deepcopy(self.stock)

    def fresh(self):
        model = self.base()
        attach(model, self.spec, seed=self.seed)
        if self.start is not None:
            initialise(model, self.start, seed=self.seed)
        return model

    def moved(self):
        return shake(self.fresh(), seed=self.seed)

    @property
    def tied(self):
        """Adapted layers whose weight another module has too."""
        owners = Counter(
            id(module.weight)
            for _, module in self.stock.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        )
        return [n for n in self.names if owners[id(self.stock.get_submodule(n).weight)] > 1]


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model() if isinstance(model, Layers) else logits(model)


# ---------------------------------------------------------------- the documented rules, again


def expected_names(model: nn.Module, targets, exclude=None, layers=None) -> list[str]:
    """``targets``, ``exclude`` and ``layers`` as the docstring of `LoRA` says them."""

    def meant(name, module, wanted):
        if wanted == "all-linear":
            return isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name) is not None
        return any(f".{name}".endswith(f".{ending}") for ending in wanted or [])

    def number(name):
        return next((int(part) for part in name.split(".") if part.isdigit()), None)

    return [
        name
        for name, module in model.named_modules()
        if name
        and meant(name, module, targets)
        and not meant(name, module, exclude)
        and (layers is None or number(name) in layers)
    ]


def rank_and_scale(spec: LoRA, name: str) -> tuple[int, float]:
    def first(patterns, default):
        hits = [v for key, v in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)]
        return [*hits, default][0]

    rank, alpha = first(spec.rank_pattern, spec.rank), first(spec.alpha_pattern, spec.alpha)
    return rank, alpha / (rank**0.5 if spec.rslora else rank)


def largest_rank(layer: nn.Module) -> int:
    return min(len(matrix(layer)) // getattr(layer, "groups", 1), matrix(layer).shape[1])


def exact_weights(case: Case, model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """W' (out, in) of every adapted layer in float64; the size of what was summed; the strain.

    The strain is how much longer a row is than what is left of it, squared, for DoRA, which
    divides by a length that it computes from a sum (1 for LoRA).
    """
    found = {}
    for name in case.names:
        layer, groups = (
            case.stock.get_submodule(name),
            getattr(case.stock.get_submodule(name), "groups", 1),
        )
        parts = {
            k: p.detach().double()
            for k, p in model.get_submodule(f"{name}.adapter")._parameters.items()
            if p is not None
        }
        W, scale = matrix(layer).double(), rank_and_scale(case.spec, name)[1]
        delta = product(parts["lora_A"], parts["lora_B"], groups)
        size = W.abs() + scale * product(parts["lora_A"].abs(), parts["lora_B"].abs(), groups)
        if "lora_A0" in parts:
            delta = delta - product(parts["lora_A0"], parts["lora_B0"], groups)
            size = size + scale * product(parts["lora_A0"].abs(), parts["lora_B0"].abs(), groups)
        V, strain = W + scale * delta, 1.0
        if "magnitude" in parts:
            ratio = parts["magnitude"] / V.norm(dim=1)
            strain = float(((W.norm(dim=1) + size.norm(dim=1)) / V.norm(dim=1)).square().max())
            V, size = V * ratio[:, None], size * ratio.abs()[:, None]
        found[name] = V, size, strain
    return found


@torch.no_grad()
def change_by_rounding(model: nn.Module, before: Tensor, unit: float) -> Tensor:
    """How far outputs move when every weight does by one rounding: some models amplify it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator).double() * 2 - 1
        parameter.mul_(1 + unit * signs)
    return (outputs(model) - before).abs().max()


# ---------------------------------------------------------------- what is drawn


@st.composite
def language_models(draw) -> tuple[str, nn.Module]:
    family = draw(st.sampled_from(list(BUILDERS)))
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([4, 8]))
    wide, layers = draw(st.integers(8, 40)), draw(st.integers(1, 3))
    if family == "gpt2":
        sizes = {"n_embd": heads * head_dim, "n_head": heads, "n_inner": wide, "n_layer": layers}
    else:
        sizes = {
            "hidden_size": heads * head_dim,
            "num_attention_heads": heads,
            "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads])),
            "intermediate_size": wide,
            "num_hidden_layers": layers,
        }
    if family == "gemma":
        sizes["head_dim"] = draw(st.sampled_from([4, 6, 8]))
    if family != "llama-tied":
        sizes["tie_word_embeddings"] = draw(st.booleans())
    seed = draw(st.integers(0, 3))
    return f"{family}({sizes}, seed={seed})", BUILDERS[family](seed=seed, **sizes)


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    kind = draw(st.sampled_from([nn.Conv1d, nn.Conv2d]))
    groups, dilation = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    layer = kind(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    sizes = [draw(st.integers(6, 9)) for _ in layer.kernel_size]
    return layer, torch.randn(2, layer.in_channels, *sizes)


@st.composite
def flat_layers(draw) -> tuple[nn.Module, Tensor]:
    if draw(st.booleans()):
        rows, out = draw(st.integers(2, 20)), draw(st.integers(1, 12))
        padding = draw(st.sampled_from([None, 0, rows - 1]))
        layer = nn.Embedding(rows, out, padding_idx=padding)
        return layer, torch.cat([torch.arange(rows), torch.randint(0, rows, (5,))]).view(1, -1)
    inputs, out = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    if draw(st.booleans()):
        layer = Conv1D(out, inputs)
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(inputs, out, bias=draw(st.booleans()))
    return layer, torch.randn(2, 5, inputs)


@st.composite
def torch_models(draw) -> tuple[str, nn.Module]:
    seed = draw(st.integers(0, 3))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = draw(st.lists(st.one_of(convolutions(), flat_layers()), min_size=1, max_size=4))
    model = Layers([layer for layer, _ in pairs], [x for _, x in pairs]).eval()
    return f"seed={seed} {model}", model


def ending(draw, name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])


def expression(draw, names: list[str]) -> str:
    """A regular expression for whole names that means at least one of ``names``."""
    name = draw(st.sampled_from(names))
    last, lasts = name.rpartition(".")[2], sorted({n.rpartition(".")[2] for n in names})
    several = draw(st.lists(st.sampled_from(names), min_size=1))
    forms = {
        "itself": re.escape(name),
        "anywhere": r"(.*\.)?" + last,
        "any layer": re.sub(r"\d+", r"\\d+", re.escape(name)),
        "some kinds": rf"(?:.+\.|)({'|'.join([*lasts[:2], 'no'])})",
        "several": "|".join(map(re.escape, several)),
    }
    return forms[draw(st.sampled_from(list(forms)))]


def pattern(draw, names: list[str]) -> str:
    """A key of a rank or alpha pattern: an expression for the end of a name."""
    name = draw(st.sampled_from(names))
    last, lasts = name.rpartition(".")[2], sorted({n.rpartition(".")[2] for n in names})
    forms = {
        "ending": re.escape(ending(draw, name)),
        "kind": last,
        "layer": rf"[01]\..*{last}",
        "kinds": "|".join(lasts),
        "middle": last[1:],  # means nothing: an ending begins after a dot
    }
    return forms[draw(st.sampled_from(list(forms)))]


def choice(draw, names: list[str]):
    """A list of endings or a regular expression, each of which means some of ``names``."""
    if draw(st.booleans()):
        return expression(draw, names)
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return [ending(draw, name) for name in some]


@st.composite
def cases(draw, models) -> Case:
    said, stock = draw(models)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *FAR]))
    stock = stock.to(dtype)
    everything = [n for n, module in stock.named_modules() if isinstance(module, ADAPTABLE)]
    linear = expected_names(stock, "all-linear")
    targets = "all-linear"
    if not linear or draw(st.integers(0, 3)):
        targets = choice(draw, everything)
    meant = expected_names(stock, targets)
    exclude = choice(draw, meant) if draw(st.integers(0, 2)) == 0 else None
    numbered = {int(part) for name in meant for part in name.split(".") if part.isdigit()}
    layers = None
    if numbered and draw(st.integers(0, 2)) == 0:
        layers = draw(st.lists(st.sampled_from(sorted(numbered)), min_size=1, unique=True))
    names = expected_names(stock, targets, exclude, layers)
    assume(names)  # `exclude` may leave nothing, which is refused
    limit = min(largest_rank(stock.get_submodule(name)) for name in names)
    ranks = st.integers(1, min(limit, 9))
    start = draw(st.sampled_from(STARTS))
    nothing = [] if isinstance(start, DIVIDES_BY_ALPHA) else [0]
    alphas = st.sampled_from([1, 2, 0.5, 3.7, 8, 16.0, *nothing])
    some = st.integers(0, 2)
    method = draw(st.sampled_from([LoRA, DoRA]))
    spec = method(
        rank=draw(ranks),
        alpha=draw(alphas),
        dropout=draw(st.sampled_from([0.0, 0.25])),  # of no effect in evaluation
        targets=targets,
        rslora=draw(st.booleans()),
        exclude=exclude,
        layers=layers,
        rank_pattern={pattern(draw, meant): draw(ranks) for _ in range(draw(some))},
        alpha_pattern={pattern(draw, meant): draw(alphas) for _ in range(draw(some))},
    )
    return Case(said, stock, spec, start, dtype, draw(st.integers(0, 5)), tuple(names))


# ---------------------------------------------------------------- what holds
# Each returns whether the case could have shown a fault.


def names_are_those_of_the_documented_rules(case: Case) -> bool:
    model = case.base()
    assert attach(model, case.spec, seed=0) == list(case.names)
    for name in case.names:
        adapter = model.get_submodule(name).adapter
        rank, scale = rank_and_scale(case.spec, name)
        assert adapter.lora_B.shape[1] == rank
        assert adapter.scale == pytest.approx(scale, rel=1e-12)
    return True


def an_adapter_starts_without_effect_to_the_bit(case: Case) -> bool:
    before = outputs(case.stock)
    assert before.isfinite().all()
    model = case.fresh()
    assert torch.equal(outputs(model), before)
    assert base_bytes(model) == base_bytes(case.stock)
    return not torch.equal(outputs(shake(model)), before)


def only_adapters_are_trainable(case: Case) -> bool:
    model = case.fresh()
    parts = ["lora_A", "lora_B", *["magnitude"] * isinstance(case.spec, DoRA)]
    expected = {f"{name}.adapter.{part}" for name in case.names for part in parts}
    assert set(trainable(model)) == expected
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    origins = {n for n, _ in model.named_parameters() if n.endswith(("lora_A0", "lora_B0"))}
    pinned = isinstance(case.start, PINNED)
    assert len(origins) == (2 * len(case.names) if pinned else 0)
    return True


def merging_gives_the_outputs_of_the_adapted_model(case: Case) -> bool:
    model = case.moved()
    before, exact = outputs(model), exact_weights(case, model)
    if case.tied:
        held = snapshot(model)
        with pytest.raises(ValueError, match="tied"):
            merge(model)
        assert snapshot(model) == held
        return True
    assert merge(model) is model
    assert shape_of(model) == shape_of(case.stock)
    others = base_bytes(model)
    for name, (W, size, strain) in exact.items():
        layer = model.get_submodule(name)
        # one rounding to the weight's dtype, after sums and products in fp32
        steps = 4 + case.spec.rank + W.shape[1]
        allowed = UNIT[case.dtype] * W.abs() + steps * 2.0**-24 * size * strain**0.5 + 1e-7
        assert ((matrix(layer).double() - W).abs() <= allowed).all(), name
        del others[f"{name}.weight"]
    stock = base_bytes(case.stock)
    assert all(stock[key] == value for key, value in others.items())
    # and both are what torch computes with the exact weights
    reference = case.base().double()
    for name, (W, *_) in exact.items():
        layer = reference.get_submodule(name)
        stored = W.T if isinstance(layer, nn.Embedding | Conv1D) else W.view(layer.weight.shape)
        layer.weight = nn.Parameter(stored.contiguous())
    wanted = outputs(reference)
    worst = max(strain for *_, strain in exact.values())
    tolerance = FAR[case.dtype] * wanted.abs().max() * (1 + worst / 100)
    tolerance += 8 * change_by_rounding(reference, wanted, UNIT[case.dtype])
    after = outputs(model)
    for one, other in ((after, before), (before, wanted), (after, wanted)):
        assert (one - other).abs().max() <= tolerance
    return not torch.equal(before, outputs(case.stock))


def a_folder_gives_the_adapter_back_to_the_bit(case: Case) -> bool:
    model = case.moved()
    before = outputs(model)
    with tempfile.TemporaryDirectory() as scratch:
        one, two, three = (Path(scratch) / name for name in ("one", "two", "three"))
        save_adapter(model, one)
        fresh = case.base()
        assert sorted(load_adapter(fresh, one)) == sorted(case.names)
        assert torch.equal(outputs(fresh), before)
        assert trainable(fresh).keys() == trainable(model).keys()
        assert base_bytes(fresh) == base_bytes(case.stock)
        save_adapter(fresh, two)
        held = shake(case.fresh(), seed=99)
        load_adapter(held, one)
        assert torch.equal(outputs(held), before)
        save_adapter(held, three)
        for file in sorted(one.iterdir()):
            assert file.read_bytes() == (two / file.name).read_bytes(), file.name
            assert file.read_bytes() == (three / file.name).read_bytes(), file.name
        config = json.loads((one / "adapter_config.json").read_text())
        stored = load_file(one / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    twice = 2 if isinstance(case.start, PINNED) else 1
    assert config["r"] == twice * case.spec.rank
    assert config["lora_dropout"] == case.spec.dropout
    return not torch.equal(before, outputs(case.stock))


def detaching_gives_the_base_back_to_the_bit(case: Case) -> bool:
    model = case.moved()
    moved = outputs(model)
    assert detach(model) is model
    assert shape_of(model) == shape_of(case.stock)
    assert {n: fingerprint(t) for n, t in model.state_dict().items()} == base_bytes(case.stock)
    assert not trainable(model)
    before = outputs(case.stock)
    assert torch.equal(outputs(model), before)
    again = case.base()
    attach(again, case.spec, seed=case.seed)
    attach(model, case.spec, seed=case.seed)  # and it can be adapted again
    assert snapshot(model)["state"] == snapshot(again)["state"]
    return not torch.equal(moved, before)


PROPERTIES = [
    names_are_those_of_the_documented_rules,
    an_adapter_starts_without_effect_to_the_bit,
    only_adapters_are_trainable,
    merging_gives_the_outputs_of_the_adapted_model,
    a_folder_gives_the_adapter_back_to_the_bit,
    detaching_gives_the_base_back_to_the_bit,
]
MODELS = {"language-model": language_models, "layers": torch_models}
every_property = pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
every_model = pytest.mark.parametrize("models", MODELS)


def hold(holds: Callable[[Case], bool], models: str, profile: settings) -> None:
    """Draw cases, and make sure that they were worth drawing."""
    seen: Counter[str] = Counter()

    @profile
    @given(cases(MODELS[models]()))
    def check(case):
        shown = holds(case)
        seen.update(
            drawn=1,
            shown=shown,
            dora=isinstance(case.spec, DoRA),
            pinned=isinstance(case.start, PINNED),
            half=case.dtype != torch.float32,
            expression=isinstance(case.spec.targets, str) and case.spec.targets != "all-linear",
            endings=isinstance(case.spec.targets, list),
            narrowed=case.spec.exclude is not None or case.spec.layers is not None,
            patterns=bool(case.spec.rank_pattern or case.spec.alpha_pattern),
        )

    check()
    assert seen["drawn"] >= 0.9 * profile.max_examples
    assert seen["shown"] >= 0.75 * seen["drawn"], seen  # alpha 0 shows nothing
    rare = {kind: count for kind, count in seen.items() if count < 0.1 * seen["drawn"]}
    assert not rare, seen


@every_model
@every_property
def test_it_holds(holds, models):
    hold(holds, models, QUICK)


@pytest.mark.slow
@every_model
@every_property
def test_it_holds_of_many_more(holds, models):
    hold(holds, models, DEEP)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_alpha_of_many_digits_comes_back_from_a_pinned_adapter(rslora, tmp_path):
    spec = LoRA(rank=3, alpha=1 / 3, rslora=rslora)
    base = BUILDERS["llama"]()
    model = copy.deepcopy(base)
    attach(model, spec, seed=0)
    initialise(model, PiSSA(), seed=0)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    scales = [m.model.layers[0].self_attn.q_proj.adapter.scale for m in (model, base)]
    assert scales[0] == scales[1]
