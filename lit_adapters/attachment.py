"""Put adapters on a model and take them off; hooks on the layers do the work."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from lit_adapters.adapters import (
    METHOD,
    Adapted,
    Adapter,
    AdapterSpec,
    adapters_of,
    own_modules,
)
from lit_adapters.blocks import make_stock
from lit_adapters.holders import is_held_elsewhere
from lit_adapters.initialisers import named_generator
from lit_adapters.targets import match_targets
from lit_adapters.weights import settle

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # else what is made there could never be trained
def attach(
    model: nn.Module, spec: AdapterSpec, seed: int | None = None, tokenizer: Any = None
) -> list[str]:
    """Freeze ``model`` and put a trainable adapter on every module that ``spec`` targets.

    Args:
        model: Any module; base state-dict keys, weights and classes stay as they are.
        spec: The method and its settings, such as ``LoRA(rank=8)``.
        seed: Seeds each adapter's start together with its layer's name; None takes the global
            seed (``seed_everything``).
        tokenizer: For a spec that starts from a text (`PrefixTuning`), or brings new tokens, which
            it learns; it keeps them even if attaching fails.

    Returns:
        The dotted names of the adapted modules.

    Raises:
        ValueError: if targets match nothing or only in part, settings do not fit a layer, or the
            model already holds adapters. The model is then unchanged.
    """
    if spec.reads_text and tokenizer is None:
        raise ValueError(
            f"{spec.name} has {spec.text_field!r} here, which needs a tokenizer: pass "
            "tokenizer=..., or leave it out"
        )
    held = [name for name, *_ in adapted_layers(model)]
    if held:
        raise ValueError(
            f"the model already holds adapters (on {held[0]!r} and {len(held) - 1} more); "
            "call `merge` or `detach` first"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with built(model, spec, tokenizer=tokenizer) as adapted:
        for name, layer, adapter in adapted:
            materialise(adapter, layer).reset(layer, named_generator(name, seed))
        mount(model, adapted)
        try:
            spec.prepare(model, tokenizer)
        except BaseException:
            detach(model)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
    return [name for name, _, adapter in adapted if adapter.slot == METHOD]


@contextmanager
def built(
    model: nn.Module,
    spec: AdapterSpec,
    stated: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Iterator[list[Adapted]]:
    """Build the adapters that ``spec`` asks for, on the meta device, for a ``with`` block.

    If the block fails, layers have the shapes they had before.

    Args:
        model: May hold adapters already.
        spec: The method and its settings.
        stated: The fields of a file's two JSON files; None when attaching.
        tokenizer: Gives new tokens their ids.

    Yields:
        The method's adapters in model order, then what is trained beside them.

    Raises:
        ValueError: as `attach`.
    """
    names = match_targets(model, spec)
    beside = spec.companions(model, names, stated or {}, tokenizer)
    found: list[list[Adapted]] = []
    try:
        # Backwards: new rows change shapes that the others must fit.
        for part in (*reversed(beside), spec):
            meant = names if part is spec else match_targets(model, part)
            modules = own_modules(model)
            layers = {name: modules[name] for name in meant}
            found.insert(0, part.build_all(layers, stated or {}))
            for _, layer, adapter in found[0]:
                adapter.claim(layer, model)
        adapted = [one for group in found for one in group]
        check_layers(model, adapted)
        yield adapted
    except BaseException:
        for _, layer, adapter in chain(*found):
            adapter.release(layer, model)
        raise


def materialise(adapter: Adapter, layer: nn.Module) -> Adapter:
    """Give a built adapter memory, values not set, on the device of ``layer``."""
    device = next(layer.parameters()).device
    for module in adapter.modules():  # `to_empty` takes five times as long
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
    return adapter


@torch.inference_mode(False)
def mount(model: nn.Module, adapted: Iterable[Adapted]) -> None:
    """Freeze ``model`` and put finished adapters on their layers."""
    for module in model.modules():
        settle(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
    for _, layer, adapter in adapted:
        adapter.claim(layer, model)
        if not any(adapters_of(layer)):
            layer.register_forward_hook(apply_adapters, with_kwargs=True)
        if adapter.changes_inputs:
            layer.register_forward_pre_hook(change_inputs, with_kwargs=True)
        if adapter.stands_in:  # no hook is called when a forward is interrupted
            layer.forward = partial(stand_in, layer, adapter.slot, layer.__dict__.get("forward"))
        layer.add_module(adapter.slot, adapter.train(layer.training))
        for parameter in adapter.trained(layer):
            parameter.requires_grad_(True)


def apply_adapters(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The forward hook of every adapted layer (at module level, so that models pickle)."""
    if is_held_elsewhere(output) and any(adapter.active for adapter in adapters_of(layer)):
        output = output.clone(memory_format=torch.contiguous_format)  # adapters may write to it
    for adapter in adapters_of(layer):
        if adapter.active:
            output = adapter(layer, args, kwargs, output)
    return output


def change_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook of layers with an adapter that `changes_inputs`."""
    for adapter in adapters_of(layer):
        if adapter.active and adapter.changes_inputs:
            args, kwargs = adapter.inputs(layer, args, kwargs)
    return args, kwargs


def stand_in(
    layer: nn.Module, slot: str, earlier: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """The ``forward`` of layers with an adapter that `stands_in`; ``earlier`` is another's."""
    run = earlier or partial(type(layer).forward, layer)
    adapter = layer._modules[slot]
    assert isinstance(adapter, Adapter)
    return adapter.call(layer, run, args, kwargs) if adapter.active else run(*args, **kwargs)


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


def adapted_layers(model: nn.Module, slot: str | None = None) -> Iterator[Adapted]:
    """Yield every adapter of ``model`` and its layer, in model order, or only those of a slot."""
    for name, layer in {"": model, **own_modules(model)}.items():
        for adapter in adapters_of(layer):
            if slot in (None, adapter.slot):
                yield Adapted(name, layer, adapter)


def detach(model: Model) -> Model:
    """Remove every adapter and its hook; the base stays frozen.

    It is as it was, except what `FullFineTuning` has trained.
    """
    unmount(model)
    make_stock(model)
    return model


@torch.inference_mode(False)
def unmount(model: nn.Module) -> list[Adapted]:
    """Take every adapter off and return them, so that `mount` can put them back."""
    adapted = list(adapted_layers(model))
    check_removable(adapted)
    for _, layer, adapter in adapted:
        adapter.release(layer, model)
        remove_adapters(layer)
    return adapted


def check_adapters_fire(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Run ``model(**batch)`` once and make sure that every adapter took part.

    Code that reads ``layer.weight`` instead of calling the layer (fused kernels, hand-written
    heads) bypasses adapters without a sign. Gradients and random state are left alone.

    Raises:
        RuntimeError: naming the adapted layers whose adapter never ran.
    """
    # A layer that is trained itself cannot be bypassed.
    silent = [one for one in adapted_layers(model) if not one.adapter.trained(one.layer)]
    fired: set[int] = set()
    handles = [
        adapter.register_forward_hook(lambda module, *_: fired.add(id(module)))
        for *_, adapter in silent
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(sorted(devices, key=str)),
            torch.compiler.set_stance("force_eager"),  # nothing is compiled for these hooks
        ):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    missed = [one for one in silent if id(one.adapter) not in fired]
    if missed:
        names = list(dict.fromkeys(one.name for one in missed))
        remedies = dict.fromkeys(one.adapter.spec.remedy for one in missed)
        raise RuntimeError(
            f"{len(missed)} of {len(silent)} adapters never ran in a forward pass: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The model uses these "
            "layers' weights without calling the layers (a fused kernel, a custom head?), or not "
            "at all (experts of a mixture that this batch sends no token to?); switch that off, "
            f"take a batch of more tokens, or {' and '.join(remedies)}"
        )


def check_removable(adapted: Iterable[Adapted]) -> None:
    """Raise a ValueError if something stands between an adapter and its layer."""
    for name, layer, adapter in adapted:
        forward = layer.__dict__.get("forward")
        if adapter.stands_in and getattr(forward, "func", None) is not stand_in:
            raise ValueError(
                f"something has wrapped the forward of {name!r} after its adapter was put there; "
                "take that off first"
            )


def remove_adapters(layer: nn.Module) -> None:
    """Take all adapters of ``layer`` and their hooks away."""
    for key, hook in list(layer._forward_hooks.items()):
        if hook is apply_adapters:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is change_inputs:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    for adapter in list(adapters_of(layer)):
        if adapter.stands_in:
            earlier = layer.__dict__.pop("forward").args[2]
            if earlier is not None:
                layer.forward = earlier
        for parameter in adapter.trained(layer):
            parameter.requires_grad_(False)
        delattr(layer, adapter.slot)


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by its id; several where weights are tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def check_layers(model: nn.Module, adapted: Sequence[Adapted]) -> None:
    """Check that adapters can be put on their layers.

    Raises:
        ValueError: if a layer has another child of the slot's name, or a weight to be trained is
            tied to a module left out, which would change as well.
    """
    for name, layer, adapter in adapted:
        child = layer._modules.get(adapter.slot)
        if child is not None and not isinstance(child, Adapter):
            raise ValueError(
                f"{name!r} has a child called {adapter.slot!r} of its own "
                f"({type(child).__name__}); leave the layer out with `exclude`"
            )
    trained = [(name, p) for name, layer, adapter in adapted for p in adapter.trained(layer)]
    owners, names = owners_of(model) if trained else {}, {name for name, *_ in adapted}
    for name, parameter in trained:
        others = [n for n in owners[id(parameter)] if n not in names]
        if others:
            raise ValueError(
                f"a weight of {name!r} is tied to {others[0]!r}, which is not to be trained; "
                "leave out both with `exclude`, or train both"
            )
