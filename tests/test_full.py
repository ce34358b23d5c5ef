"""Full fine-tuning: the base itself trains, behind the same functions as every adapter."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_adapters import FullFineTuning, attach, detach, load_adapter, merge, save_adapter
from tests.models import BUILDERS, batch, llama, llama_tied, logits, shape_of, snapshot, trainable

FAMILIES = ["llama", "llama-tied", "qwen2", "gpt2"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def full_model(family, **settings):
    model = BUILDERS[family]()
    names = attach(model, FullFineTuning(**settings))
    assert names
    return model


def train(model, steps=5, lr=2e-3):
    """AdamW; returns the losses before each step and after the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, model.eval()(**batch()).loss.item()]


@every_family
def test_every_parameter_trains_and_nothing_is_added(family):
    model, stock = full_model(family), BUILDERS[family]()
    assert trainable(model).keys() == dict(stock.named_parameters()).keys()
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(logits(model), logits(stock))
    for name, value in stock.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


@every_family
def test_gradients_are_those_of_the_plain_model(family):
    model, stock = full_model(family), BUILDERS[family]()
    model(**batch()).loss.backward()
    stock.requires_grad_(True)
    stock(**batch()).loss.backward()
    for name, parameter in stock.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


@every_family
def test_steps_are_those_of_the_plain_model_and_lower_the_loss(family):
    model, stock = full_model(family), BUILDERS[family]()
    losses = train(model)
    assert losses == train(stock)
    assert losses[-1] < 0.9 * losses[0]
    for name, value in stock.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


@every_family
def test_a_saved_folder_gives_the_trained_model_on_a_fresh_base_to_the_bit(family, tmp_path):
    model = full_model(family)
    train(model)
    save_adapter(model, tmp_path)
    torch.manual_seed(999)
    fresh = BUILDERS[family]()
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-2)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh.eval()), logits(model))
    assert trainable(fresh).keys() == trainable(model).keys()
    for name, value in model.named_parameters():
        assert torch.equal(fresh.get_parameter(name), value), name
    assert train(fresh, steps=2) == train(model, steps=2)  # and it trains on


@every_family
def test_a_tied_weight_is_stored_once_and_still_tied_after_loading(family, tmp_path):
    model = full_model(family)
    train(model, steps=1)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = sum(tensor.numel() for tensor in load_file(file).values())
    assert stored == sum(p.numel() for p in model.parameters())
    assert file.stat().st_size < 4 * stored + 20_000
    fresh = BUILDERS[family]()
    load_adapter(fresh, tmp_path)
    if family in ("llama-tied", "gpt2"):
        assert fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight
    assert sum(p.numel() for p in fresh.parameters()) == stored


def test_a_part_of_the_base_is_refused_on_another_base(tmp_path):
    """What was frozen is not in the file, and must be what it was trained against."""
    model = full_model("llama", exclude=["embed_tokens"])
    train(model)
    save_adapter(model, tmp_path)
    other = llama(seed=5)
    before = snapshot(other)
    with pytest.raises(ValueError, match="base"):
        load_adapter(other, tmp_path)
    assert snapshot(other) == before


def test_the_whole_base_is_in_the_file_and_what_was_there_before_does_not_matter(tmp_path):
    model = full_model("llama")
    train(model)
    save_adapter(model, tmp_path)
    other = llama(seed=5)
    load_adapter(other, tmp_path, check_base=False)
    assert torch.equal(logits(other.eval()), logits(model))


@every_family
def test_peft_refuses_the_folder(family, tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(full_model(family), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((KeyError, ValueError, TypeError)):
            peft.PeftModel.from_pretrained(BUILDERS[family](), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] != "LORA"


@every_family
def test_merge_leaves_a_stock_model_with_the_trained_weights(family, tmp_path):
    model = full_model(family)
    train(model)
    expected, stock = logits(model), BUILDERS[family]()
    merge(model)
    assert torch.equal(logits(model), expected)
    assert shape_of(model) == shape_of(stock)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(logits(loaded), expected)


@every_family
def test_detach_leaves_the_trained_weights_frozen(family):
    model = full_model(family)
    train(model)
    expected = logits(model)
    detach(model)
    assert torch.equal(logits(model), expected)
    assert not trainable(model)
    assert shape_of(model) == shape_of(BUILDERS[family]())


# ---------------------------------------------------------------- a part of the base


def expect_trainable(model, keep):
    names = dict(model.named_parameters())
    expected = {name for name in names if keep(name)}
    assert expected
    assert len(expected) < len(names)
    assert trainable(model).keys() == expected


@pytest.mark.parametrize(
    ("settings", "keep"),
    [
        ({"exclude": ["lm_head"]}, lambda n: "lm_head" not in n),
        ({"exclude": ["embed_tokens", "lm_head", "norm"]},
         lambda n: not n.startswith(("model.embed", "lm_head", "model.norm"))),
        ({"exclude": r".*\.mlp\..*"}, lambda n: ".mlp." not in n),
        ({"targets": ["q_proj", "input_layernorm"]},
         lambda n: "q_proj" in n or "input_layernorm" in n),
        ({"targets": ["mlp.up_proj"], "layers": [1]}, lambda n: n.endswith("1.mlp.up_proj.weight")),
        ({"layers": [0]}, lambda n: ".layers.0." in n),
    ],
    ids=["head", "ends", "regex", "list", "list-and-layers", "layers"],
)  # fmt: skip
def test_targets_exclude_and_layers_choose_what_trains(settings, keep, tmp_path):
    model = full_model("llama", **settings)
    expect_trainable(model, keep)
    stock = llama()
    train(model)
    for name, value in stock.named_parameters():
        assert torch.equal(model.get_parameter(name), value) is not keep(name), name
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == sum(keep(name) for name, _ in stock.named_parameters())
    load_adapter(stock, tmp_path)
    assert torch.equal(logits(stock.eval()), logits(model))
    expect_trainable(stock, keep)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_excluded_end_of_a_tied_pair_never_changes_silently(end):
    """One parameter cannot both train and stay: an error, or frozen at both ends."""
    model = llama_tied()
    before = model.lm_head.weight.detach().clone()
    try:
        attach(model, FullFineTuning(exclude=[end]))
    except ValueError as error:
        assert end in str(error)  # noqa: PT017 (refusing is one of the right answers)
        return
    train(model)
    assert torch.equal(model.get_output_embeddings().weight, before)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_target_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no_such_layer"):
        attach(llama(), FullFineTuning(targets=["q_proj", "no_such_layer"]))


def with_batch_norm(affine):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Flatten(), nn.Linear(96, 4))


@pytest.mark.parametrize(
    ("settings", "affine"),
    [
        pytest.param({}, True, id="trained"),
        pytest.param({"targets": ["0", "1"]}, True, id="named"),
        pytest.param({}, False, id="no-parameters"),
        pytest.param({"targets": ["0"]}, True, id="left-out"),
        pytest.param({"exclude": ["1"]}, True, id="excluded"),
    ],
)
def test_running_statistics_travel_or_are_refused(settings, affine, tmp_path):
    """A batch norm learns in its buffers too; a model without them computes something else."""
    x, model, fresh = torch.randn(8, 3, 6, 6), with_batch_norm(affine), with_batch_norm(affine)
    try:
        attach(model, FullFineTuning(**settings))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model.train()(x).square().sum().backward()
            optimizer.step()
        save_adapter(model, tmp_path)
        load_adapter(fresh, tmp_path)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert "BatchNorm2d" in str(error)  # noqa: PT017 (refusing is one of the right answers)
        return
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_bf16_base_trains_and_travels_in_its_own_dtype(tmp_path):
    model = llama().bfloat16()
    attach(model, FullFineTuning())
    losses = train(model)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path)
    fresh = llama().bfloat16()
    load_adapter(fresh, tmp_path)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(fresh.eval()), logits(model))
