"""Adapters that read one input share a product: the same numbers, and never those of another."""

import copy
import pickle
from weakref import ref

import pytest
import torch

from lit_adapters import AdapterFineTuneModule, DoRA, LoRA, PiSSA, attach, initialise
from lit_adapters.attachment import adapted_layers, bypassed
from lit_adapters.input_sharing import finding_shared_inputs
from tests.models import batch, llama, shake

METHODS = {
    "lora": LoRA(rank=4),
    "ranks": LoRA(rank=4, rank_pattern={"k_proj": 2, "up_proj": 7}, alpha_pattern={"v_proj": 3}),
    "dora": DoRA(rank=4),
    "dropout": LoRA(rank=4, dropout=0.3),
}


def adapted(spec, dtype=torch.float32):
    model = llama().to(dtype)
    attach(model, spec)
    return shake(model).train()


def share(model):
    with finding_shared_inputs(model), torch.no_grad():
        model(**batch(), use_cache=False)
    return model


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def groups(model):
    members = {id(a.shared_input): a.shared_input.members for *_, a in sharing(model)}
    names = {adapter: name for name, _, adapter in adapted_layers(model)}
    return [[names[member].rpartition(".")[2] for member in found] for found in members.values()]


def sharing(model):
    return [one for one in adapted_layers(model) if one.adapter.shared_input is not None]


def narrow_products(monkeypatch):
    """The widths of shared products, as they are computed."""
    from lit_adapters.adapters import shared_input

    widths, compute = [], shared_input.narrow_products

    def counting(x, factors):
        widths.append([len(A) for A in factors])
        return compute(x, factors)

    monkeypatch.setattr(shared_input, "narrow_products", counting)
    return widths


def test_queries_keys_and_values_are_found_and_gate_and_up():
    model = share(adapted(LoRA(rank=4, targets="all-linear")))
    layers = model.config.num_hidden_layers
    assert groups(model) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * layers


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_separate_products(method, dtype, most, monkeypatch):
    widths = narrow_products(monkeypatch)
    apart = adapted(METHODS[method], dtype)
    together = share(copy.deepcopy(apart))
    del widths[:]
    expected = gradients(apart)
    assert not widths
    found = gradients(together)
    assert bool(widths) == (method != "dropout")  # where each has a mask of its own
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= most * value.norm(), name


def test_each_product_is_of_all_factors_once_a_layer(monkeypatch):
    model = share(adapted(METHODS["ranks"]))
    widths = narrow_products(monkeypatch)
    gradients(model)
    assert widths == [[4, 2, 4], [4, 7]] * model.config.num_hidden_layers


def test_a_pinned_start_is_computed_apart(monkeypatch):
    model = llama()
    attach(model, METHODS["lora"])
    initialise(model, PiSSA())
    widths = narrow_products(monkeypatch)
    expected = gradients(model.train())
    assert gradients(share(model)).keys() == expected.keys()
    assert not widths


def called(model, name, x):
    return model.get_submodule(f"model.layers.0.self_attn.{name}")(x)


def input_of(model):
    return torch.randn(1, 3, model.config.hidden_size)


def test_another_input_a_changed_one_and_a_changed_factor_get_a_product_of_their_own():
    model = share(adapted(METHODS["lora"]))
    alone = copy.deepcopy(model)
    for *_, adapter in adapted_layers(alone):
        adapter.shared_input = None

    def same(x):
        torch.testing.assert_close(called(model, "k_proj", x), called(alone, "k_proj", x))

    x = input_of(model)
    called(model, "q_proj", x)
    same(x.clone())
    called(model, "q_proj", x)
    x.mul_(3)
    same(x)
    called(model, "q_proj", x)
    for one in (model, alone):
        with torch.no_grad():
            one.get_submodule("model.layers.0.self_attn.k_proj").adapter.lora_A.mul_(3)
    same(x)
    called(model, "q_proj", x)
    same(x)
    same(x)  # what was taken is gone


def test_another_thread_that_overtakes_leaves_each_its_own_product(monkeypatch):
    from lit_adapters.adapters import shared_input

    model = share(adapted(METHODS["lora"]))
    alone = copy.deepcopy(model)
    for *_, adapter in adapted_layers(alone):
        adapter.shared_input = None
    slow, fast = input_of(model), input_of(model)
    compute = shared_input.narrow_products

    def overtaken(x, factors):
        if x is slow:
            called(model, "q_proj", fast)
        return compute(x, factors)

    monkeypatch.setattr(shared_input, "narrow_products", overtaken)
    called(model, "q_proj", slow)
    for x in (fast, slow):
        torch.testing.assert_close(called(model, "k_proj", x), called(alone, "k_proj", x))


def test_what_was_computed_without_a_graph_is_not_trained_on():
    model = share(adapted(METHODS["lora"]))
    x = input_of(model)
    with torch.no_grad():
        called(model, "q_proj", x)
    called(model, "k_proj", x).sum().backward()
    assert model.get_submodule("model.layers.0.self_attn.k_proj").adapter.lora_A.grad.any()
    with torch.inference_mode():
        inner = input_of(model)
        assert called(model, "q_proj", inner).isfinite().all()
        assert called(model, "k_proj", inner).isfinite().all()


def test_inactive_adapters_are_left_out(monkeypatch):
    model = share(adapted(METHODS["lora"]))
    widths = narrow_products(monkeypatch)
    with bypassed(model):
        gradients_off = model(**batch(), use_cache=False).loss
    assert not widths
    assert gradients_off.isfinite()
    model.get_submodule("model.layers.0.self_attn.k_proj").adapter.active = False
    model(**batch(), use_cache=False)
    assert widths[0] == [4, 4]


def test_a_member_that_is_not_called_gets_no_gradient_and_the_others_theirs():
    model = share(adapted(METHODS["lora"]))
    alone = copy.deepcopy(model)
    for *_, adapter in adapted_layers(alone):
        adapter.shared_input = None
    x = input_of(model)
    given = {}
    for one in (model, alone):
        sum(called(one, name, x).square().sum() for name in ("q_proj", "v_proj")).backward()
        given[one] = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
    assert sum(gradient is not None for gradient in given[alone].values()) == 4
    for name, gradient in given[alone].items():
        assert (gradient is None) == (given[model][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(given[model][name], gradient)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_among_its_own(again, monkeypatch):
    model = share(adapted(METHODS["lora"]))
    called(model, "q_proj", input_of(model))  # something is on its way
    other = again(model)
    assert groups(other) == groups(model)
    own = {adapter for *_, adapter in adapted_layers(other)}
    assert all(set(adapter.shared_input.members) <= own for *_, adapter in sharing(other))
    widths = narrow_products(monkeypatch)
    gradients(other)
    assert widths


def test_recomputed_layers_share_too(monkeypatch):
    from lit_adapters.recompute import recompute_activations

    model = share(adapted(METHODS["lora"]))
    expected = gradients(model)
    recompute_activations(model)
    widths = narrow_products(monkeypatch)
    found = gradients(model)
    assert len(widths) == 4 * model.config.num_hidden_layers  # forward, and again
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_inputs_of_the_pass_that_watches_are_not_kept():
    model = adapted(METHODS["lora"])
    alive = []
    last = model.model.layers[-1].mlp.down_proj
    first = model.model.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda layer, args: alive.append(ref(args[0])))
    last.register_forward_hook(lambda *_: alive.append(alive[0]() is None))
    share(model)
    assert alive[1]


def test_a_trained_model_that_is_passed_on_computes_apart_until_it_is_watched_again():
    model = share(adapted(METHODS["lora"]))
    assert sharing(model)
    AdapterFineTuneModule(model, METHODS["lora"]).configure_model()
    assert not sharing(model)


def test_autocast_that_ends_between_two_members_is_noticed():
    model = share(adapted(METHODS["lora"]))
    x = input_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        called(model, "q_proj", x)
    adapter = model.get_submodule("model.layers.0.self_attn.k_proj").adapter
    assert adapter.shared_input.product(adapter, x) is None


def test_gradients_by_torch_func_are_those_of_autograd():
    model = share(adapted(METHODS["lora"]))
    expected = gradients(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        inputs = (batch()["input_ids"],)
        more = {"labels": batch()["labels"], "use_cache": False}
        return torch.func.functional_call(model, values, inputs, more).loss

    for name, value in torch.func.grad(loss)(trained).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
