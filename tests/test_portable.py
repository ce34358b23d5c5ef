"""An adapter's folder is the whole adapter: it needs the original base and nothing else.

Starts that pin an origin are written as the difference to it, a LoRA of twice the rank, so that
nothing is decomposed again on loading, here or in PEFT.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from lit_adapters import (
    DoRA,
    LoRA,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    attach,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from tests.models import base_bytes, batch, gpt2, llama, logits, shake, trainable
from tests.reference import close

peft = pytest.importorskip("peft")
from peft.tuners.lora.config import CordaConfig, LoraGAConfig  # noqa: E402
from peft.tuners.lora.corda import preprocess_corda  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402

STARTS = {
    "pissa": PiSSA(niter=1),
    "olora": OLoRA(),
    "milora": MiLoRA(),
    "lora-ga": LoRAGA(),
}
FAMILIES = {"llama": llama, "gpt2": gpt2}
FIRST = {"llama": "q_proj", "gpt2": "c_attn"}
RANK, ALPHA = 4, 6
RANKS = {"first": 3, r".*\.1\.mlp.*": 6}  # "first" stands for the family's first linear layer
ALPHAS = {"first": 5, r".*\.0\..*": 2.5}
SETTINGS = {
    "plain": {},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "rslora-patterns": {"rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
}
SPECS = {"lora": LoRA, "dora": DoRA}

every_start = pytest.mark.parametrize("start", STARTS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_setting = pytest.mark.parametrize("settings", SETTINGS)
every_method = pytest.mark.parametrize("method", SPECS)


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def named(pattern, family):
    return {FIRST[family] if key == "first" else key: v for key, v in pattern.items()}


def started(family, start, settings="plain", method="lora"):
    model = FAMILIES[family]()
    fields = {
        key: named(value, family) if isinstance(value, dict) else value
        for key, value in SETTINGS[settings].items()
    }
    attach(model, SPECS[method](rank=RANK, alpha=ALPHA, **fields), seed=0)
    initialise(model, STARTS[start], batches=[batch()] if start == "lora-ga" else None, seed=0)
    return model


def train(model, steps=20):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
    return model.eval()


# ---------------------------------------------------------------- check 4


@every_family
@every_start
@every_setting
@every_method
def test_a_trained_adapter_loads_on_a_fresh_base_here_and_in_peft(
    family, start, settings, method, tmp_path
):
    model = started(family, start, settings, method)
    before = base_bytes(model)
    train(model)
    expected = logits(model)
    assert (expected - logits(FAMILIES[family]())).abs().max() > 0.1
    assert base_bytes(model) == before
    save_adapter(model, tmp_path)

    torch.manual_seed(999)  # a decomposition repeated on loading would differ
    fresh = FAMILIES[family]()
    load_adapter(fresh, tmp_path)
    close(logits(fresh.eval()), expected)
    assert base_bytes(fresh) == before

    torch.manual_seed(31)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path))
    close(logits(theirs.eval()), expected)


@every_family
@every_start
@pytest.mark.parametrize("settings", ["plain", "rslora-patterns"])
@every_method
def test_training_goes_on_after_loading_as_if_nothing_had_happened(
    family, start, settings, method, tmp_path
):
    model = train(started(family, start, settings, method), steps=3)
    save_adapter(model, tmp_path)
    fresh = FAMILIES[family]()
    load_adapter(fresh, tmp_path)
    mine, yours = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert mine.keys() == yours.keys()
    assert any(name.endswith("lora_A0") for name in mine)
    for name, value in mine.items():  # origins too
        assert torch.equal(yours[name], value), name
        assert yours[name].requires_grad == value.requires_grad, name
    old = trainable(model)
    train(model, steps=1)
    train(fresh, steps=1)
    for name, value in trainable(model).items():
        assert torch.equal(fresh.get_parameter(name), value), name
        assert not torch.equal(old[name], value), name


@every_family
@every_start
@every_setting
def test_the_config_and_the_file_say_twice_the_rank(family, start, settings, tmp_path):
    model = shake(started(family, start, settings), std=0.05)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    rslora = "rslora" in settings
    factor = 2**0.5 if rslora else 2
    assert config["r"] == 2 * RANK
    assert config["lora_alpha"] == pytest.approx(factor * ALPHA)
    assert config["use_rslora"] is rslora
    assert config["init_lora_weights"] is True
    if "patterns" in settings:
        ranks, alphas = named(RANKS, family), named(ALPHAS, family)
        assert config["rank_pattern"] == {key: 2 * value for key, value in ranks.items()}
        assert config["alpha_pattern"].keys() == alphas.keys()
        for key, value in alphas.items():
            assert config["alpha_pattern"][key] == pytest.approx(factor * value)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if name.endswith(".adapter"):
            key = "base_model.model." + name.removesuffix(".adapter")
            A, B = module.lora_A, module.lora_B
            stored_A, stored_B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            assert torch.equal(stored_A, torch.cat([A, module.lora_A0]))
            assert torch.equal(stored_B, torch.cat([B, -module.lora_B0], dim=1))


@every_family
@every_start
@every_setting
@every_method
def test_without_our_side_file_it_is_plain_lora_of_twice_the_rank(
    family, start, settings, method, tmp_path
):
    model = shake(started(family, start, settings, method), std=0.05)
    save_adapter(model, tmp_path)
    (tmp_path / "lit_adapters.json").unlink()
    fresh = FAMILIES[family]()
    names = load_adapter(fresh, tmp_path)
    close(logits(fresh.eval()), logits(model))
    for name in names:
        mine, yours = model.get_submodule(name).adapter, fresh.get_submodule(name).adapter
        assert yours.lora_A.shape[0] == 2 * mine.lora_A.shape[0]
        assert yours.lora_A0 is None
        assert yours.scale == pytest.approx(mine.scale)


@every_family
@every_method
def test_merged_after_loading_equals_merged_before_saving(family, method, tmp_path):
    model = shake(started(family, "pissa", "rslora-patterns", method), std=0.05)
    save_adapter(model, tmp_path)
    fresh = FAMILIES[family]()
    load_adapter(fresh, tmp_path)
    found, expected = merge(fresh).state_dict(), merge(model).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value)


@every_family
@every_start
def test_a_loaded_folder_saves_again_to_the_same_tensors_and_settings(family, start, tmp_path):
    model = shake(started(family, start, "rslora-patterns", "dora"), std=0.05)
    save_adapter(model, tmp_path / "one")
    fresh = FAMILIES[family]()
    load_adapter(fresh, tmp_path / "one")
    save_adapter(fresh, tmp_path / "two")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(two[key], value), key
    one, two = (
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", "two")
    )
    for name in ("lora_alpha", "alpha_pattern"):  # times and over sqrt(2): the last digit may go
        assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-12)
    assert two == one
    one, two = (
        json.loads((tmp_path / n / "lit_adapters.json").read_text()) for n in ("one", "two")
    )
    assert one["initialiser"] == repr(STARTS[start])
    assert one["origin"] is not None
    assert two == one


@every_start
def test_a_bf16_base_loads_to_the_bit(start, tmp_path):
    model = llama().bfloat16()
    attach(model, LoRA(rank=4, alpha=4), seed=0)
    initialise(model, STARTS[start], batches=[batch()] if start == "lora-ga" else None, seed=0)
    shake(model, std=0.05)
    save_adapter(model, tmp_path)
    fresh = llama().bfloat16()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh.eval()), logits(model))
    assert not torch.equal(logits(model), logits(llama().bfloat16()))


# ---------------------------------------------------------------- PEFT's base-rewriting starts


def written_by_peft(start, folder):
    """A PEFT folder of a start that rewrote its base while it was made."""
    extra = {}
    if start == "corda":
        extra = {"corda_config": CordaConfig(corda_method="kpm")}
    if start == "lora_ga":
        extra = {"lora_ga_config": LoraGAConfig()}
    made = True if start == "loftq" else start  # LoftQ itself needs a GPU: its name is written in
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=made, **extra
    )
    base = llama()
    if start == "corda":
        row = batch()["input_ids"][:1]  # one row at a time, or PEFT's covariance fails
        preprocess_corda(base, config, run_model=lambda: base(row))
    if start == "lora_ga":
        preprocess_loraga(base, config, train_step=lambda: base(**batch()).loss.backward())
    model = peft.get_peft_model(base, config)
    shake(model, std=0.05)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    if start == "loftq":
        fields = {**json.loads(path.read_text()), "init_lora_weights": start}
        path.write_text(json.dumps(fields))
    assert json.loads(path.read_text())["init_lora_weights"] == start


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_folder_of_peft_whose_base_was_rewritten_is_refused_with_the_reason(start, tmp_path):
    quietly(lambda: written_by_peft(start, tmp_path))
    model = llama()
    before = model.state_dict().keys(), logits(model)
    with pytest.raises((ValueError, NotImplementedError), match=start) as caught:
        load_adapter(model, tmp_path)
    assert "base" in str(caught.value)
    assert model.state_dict().keys() == before[0]
    assert torch.equal(logits(model), before[1])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_the_same_folder_converted_by_peft_loads_here(start, tmp_path):
    """PEFT's own conversion to a LoRA of twice the rank is a folder like any other."""
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start
    )
    model = quietly(lambda: peft.get_peft_model(llama(), config))
    quietly(lambda: model.save_pretrained(tmp_path / "start"))
    shake(model, std=0.05).eval()
    expected = logits(model)
    quietly(
        lambda: model.save_pretrained(
            tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    )
    fresh = llama()
    load_adapter(fresh, tmp_path / "end")
    close(logits(fresh.eval()), expected)
