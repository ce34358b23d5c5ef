"""Which modules a spec means: ``targets``, ``exclude`` and ``layers`` resolved on a model."""

import difflib

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_adapters.adapters import Part, own_modules
from lit_adapters.adapters.patterns import check_pattern, matches


def match_targets(model: nn.Module, spec: Part) -> list[str]:
    """Return the dotted names of the modules that ``spec`` adapts, in model order.

    Raises:
        ValueError: if nothing matches, an entry of a target list matches nothing, a pattern is no
            regular expression, or a matched module cannot hold an adapter.
    """
    modules = own_modules(model)
    names = _select(modules, spec.targets, "targets", model, spec)
    if spec.exclude is not None:
        excluded = set(_select(modules, spec.exclude, "exclude", model, spec))
        names = [name for name in names if name not in excluded]
    if spec.layers is not None:
        names = [name for name in names if _layer_number(name) in spec.layers]
    if not names:
        raise ValueError(
            f"no module is left to adapt: targets={spec.targets!r}, exclude={spec.exclude!r}, "
            f"layers={spec.layers!r} leave nothing. {_nearest(str(spec.targets), modules, spec)}"
        )
    unfit = [name for name in names if not spec.fits(modules[name])]
    if unfit:
        kind = type(modules[unfit[0]]).__name__
        raise ValueError(
            f"targets={spec.targets!r} matches {unfit[0]!r}, a {kind}, which cannot hold a "
            f"{type(spec).__name__} adapter. {_nearest('', modules, spec)}"
        )
    selected = spec.select(names)
    if not selected:
        raise ValueError(
            f"no module is left to adapt: all {len(names)} that targets={spec.targets!r} matches "
            "are trained whole (modules_to_save)"
        )
    return selected


def shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Return the shortest target list that means exactly ``names``: last parts if they suffice."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    meant = [n for n in own_modules(model) if any(_ends_with(n, ending) for ending in endings)]
    return endings if sorted(meant) == sorted(names) else sorted(names)


def _select(
    modules: dict[str, nn.Module],
    wanted: str | list[str],
    field: str,
    model: nn.Module,
    spec: Part,
) -> list[str]:
    if wanted == "all":
        return [name for name, module in modules.items() if spec.fits(module)]
    if wanted == "all-linear":
        heads = {
            id(module.get_output_embeddings())
            for module in model.modules()  # the language model may be wrapped in something else
            if isinstance(module, PreTrainedModel)
        }
        return [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads
        ]
    if isinstance(wanted, str):
        check_pattern(wanted, field)
        names = [name for name in modules if matches(wanted, name, field)]
        if not names:
            raise ValueError(
                f"{field}={wanted!r} matches no module. A string is a regular expression for the "
                "whole dotted name; write a list for name endings. "
                f"{_nearest(wanted, modules, spec)}"
            )
        return names
    for entry in wanted:
        if not any(_ends_with(name, entry) for name in modules):
            raise ValueError(
                f"{field} entry {entry!r} matches no module. {_nearest(entry, modules, spec)}"
            )
    return [name for name in modules if any(_ends_with(name, entry) for entry in wanted)]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _layer_number(name: str) -> int | None:
    """The first number among the parts of a dotted name: the index of the decoder layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _nearest(wanted: str, modules: dict[str, nn.Module], spec: Part) -> str:
    """A sentence listing the target names that look most like ``wanted``."""
    endings = {
        name.rpartition(".")[2]: None for name, module in modules.items() if spec.fits(module)
    }
    wanted = wanted.rpartition(".")[2]
    near = difflib.get_close_matches(wanted, endings, n=5, cutoff=0.5) or list(endings)[:12]
    return f"Did you mean one of: {', '.join(near)}?" if near else "The model has no such layers."
