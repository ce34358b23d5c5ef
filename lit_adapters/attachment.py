"""Put adapters on a model, take them off, merge them in; one forward hook does the work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lit_adapters.adapters import Adapted, Adapter, AdapterSpec
from lit_adapters.initialisers import named_generator
from lit_adapters.targets import match_targets

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: nn.Module, spec: AdapterSpec, seed: int | None = None, tokenizer: Any = None
) -> list[str]:
    """Freeze ``model`` and put a trainable adapter on every module that ``spec`` targets.

    Args:
        model: Any module; base state-dict keys, weights and classes stay as they are.
        spec: The method and its settings, such as ``LoRA(rank=8)``.
        seed: Seeds each adapter's start together with its layer's name; None takes the global
            seed (``seed_everything``).
        tokenizer: For a spec that starts from a text (`PrefixTuning`).

    Returns:
        The dotted names of the adapted modules.

    Raises:
        ValueError: if targets match nothing or only in part, settings do not fit a layer, or the
            model already holds adapters. The model is then unchanged.
    """
    if spec.reads_text and tokenizer is None:
        raise ValueError(
            f"{spec.name} starts from a text here, which needs a tokenizer: pass tokenizer=..., or "
            "leave the text out and call `start_from_text(model, input_ids)`"
        )
    held = [name for name, *_ in adapted_layers(model)]
    if held:
        raise ValueError(
            f"the model already holds adapters (on {held[0]!r} and {len(held) - 1} more); "
            "call `merge` or `detach` first"
        )
    names = match_targets(model, spec)
    layers = {name: model.get_submodule(name) for name in names}
    adapters = {name: spec.build(layer, name) for name, layer in layers.items()}
    check_layers(model, adapters)
    for name, layer in layers.items():
        materialise(adapters[name], layer).reset(layer, named_generator(name, seed))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mount(model, adapters)
    try:
        spec.prepare(model, tokenizer)
    except BaseException:
        detach(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return names


def materialise(adapter: Adapter, layer: nn.Module) -> Adapter:
    """Give a built adapter memory, values not set, on the device of ``layer``."""
    return adapter.to_empty(device=next(layer.parameters()).device)


def mount(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Freeze ``model`` and put finished adapters on the layers they are named after."""
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        layer.add_module("adapter", adapter.train(layer.training))
        layer.register_forward_hook(apply_adapter, with_kwargs=True)
        if adapter.changes_inputs:
            layer.register_forward_pre_hook(change_inputs, with_kwargs=True)
        for parameter in adapter.trained(layer):
            parameter.requires_grad_(True)


def apply_adapter(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The forward hook of every adapted layer (at module level, so that models pickle)."""
    adapter = cast(Adapter, layer.adapter)
    return adapter(layer, args, kwargs, output) if adapter.active else output


def change_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook of layers whose adapter `changes_inputs`."""
    adapter = cast(Adapter, layer.adapter)
    return adapter.inputs(layer, args, kwargs) if adapter.active else (args, kwargs)


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Let the model compute without its adapters for the duration of a ``with`` block."""
    adapters = [adapter for *_, adapter in adapted_layers(model) if adapter.active]
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


def adapted_layers(model: nn.Module) -> Iterator[Adapted]:
    """Yield every layer of ``model`` that holds an adapter, in model order."""
    for name, layer in model.named_modules():
        adapter = layer._modules.get("adapter")
        if isinstance(adapter, Adapter):
            yield Adapted(name, layer, adapter)


def detach(model: Model) -> Model:
    """Remove every adapter and its hook; the base stays frozen.

    It is as it was, except what `FullFineTuning` has trained.
    """
    for _, layer, _ in list(adapted_layers(model)):
        _remove(layer)
    return model


def merge(model: Model) -> Model:
    """Fold every adapter into its layer's weight (fp32 sum, rounded once) and remove it.

    Returns:
        ``model`` itself, now with the classes and state-dict keys it had before `attach`.

    Raises:
        ValueError: if a weight is shared with a module outside the adapter (a tied output head),
            which merging would change too, if the method cannot be merged (prompts), or the model
            holds no adapter. Nothing is then merged.
    """
    adapted = list(adapted_layers(model))
    if not adapted:
        raise ValueError("the model holds no adapters, so there is nothing to merge")
    _refuse_tied(model, adapted)
    with torch.no_grad():
        for _, layer, adapter in adapted:
            adapter.merge_into(layer)
            _remove(layer)
    return model


def check_adapters_fire(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Run ``model(**batch)`` once and make sure that every adapter took part.

    Code that reads ``layer.weight`` instead of calling the layer (fused kernels, hand-written
    heads) bypasses adapters without a sign. Gradients and random state are left alone.

    Raises:
        RuntimeError: naming the adapted layers whose adapter never ran.
    """
    silent = {  # a layer that is trained itself cannot be bypassed
        name: adapter
        for name, layer, adapter in adapted_layers(model)
        if not adapter.trained(layer)
    }
    fired: set[int] = set()
    handles = [
        adapter.register_forward_hook(lambda module, *_: fired.add(id(module)))
        for adapter in silent.values()
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, adapter in silent.items() if id(adapter) not in fired]
    if missed:
        raise RuntimeError(
            f"{len(missed)} of {len(silent)} adapters never ran in a forward pass: "
            f"{', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}. The model uses these "
            "layers' weights without calling the layers (a fused kernel, a custom head?), or not "
            "at all; switch that off or leave them out with `exclude`"
        )


def _remove(layer: nn.Module) -> None:
    for key, hook in list(layer._forward_hooks.items()):
        if hook is apply_adapter:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is change_inputs:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    for parameter in cast(Adapter, layer.adapter).trained(layer):
        parameter.requires_grad_(False)
    del layer.adapter


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by its id; several where weights are tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def check_layers(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Check that ``adapters`` can be put on the layers they are named after.

    Raises:
        ValueError: if a layer has another child called ``adapter``, or a weight to be trained is
            tied to a module left out, which would change as well.
    """
    owners = _owners(model)
    for name, adapter in adapters.items():
        child = model.get_submodule(name)._modules.get("adapter")
        if child is not None and not isinstance(child, Adapter):
            raise ValueError(
                f"{name!r} has a child called 'adapter' of its own ({type(child).__name__}); leave "
                "the layer out with `exclude`"
            )
        for parameter in adapter.trained(model.get_submodule(name)):
            others = [n for n in owners[id(parameter)] if n not in adapters]
            if others:
                raise ValueError(
                    f"a weight of {name!r} is tied to {others[0]!r}, which is not to be trained; "
                    "leave out both with `exclude`, or train both"
                )


def _refuse_tied(model: nn.Module, adapted: list[Adapted]) -> None:
    """Merging into a tied weight would change the module at its other end as well."""
    owners = _owners(model)
    trained = {id(p) for _, layer, adapter in adapted for p in adapter.trained(layer)}
    for name, layer, _ in adapted:
        weight = getattr(layer, "weight", None)
        if weight is None or id(weight) in trained:  # nothing is written
            continue
        shared = [n for n in owners[id(weight)] if n != name]
        if shared:
            raise ValueError(
                f"the weight of {name!r} is tied to {', '.join(map(repr, shared))}; merging would "
                f"change both. Untie it first, for example: "
                f"model.get_submodule({name!r}).weight = nn.Parameter(weight.clone()) and "
                f"model.config.tie_word_embeddings = False"
            )
