"""Which modules a spec means: ``targets``, ``exclude`` and ``layers`` resolved on a model."""

import difflib
import logging
import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_adapters.adapters import Part, own_modules
from lit_adapters.adapters.fields import shown
from lit_adapters.adapters.patterns import check_pattern, matches
from lit_adapters.weights import foreign_forward

log = logging.getLogger(__name__)


def match_targets(model: nn.Module, spec: Part) -> list[str]:
    """Return the dotted names of the modules that ``spec`` adapts, in model order.

    Raises:
        ValueError: if nothing matches, an entry of a target list matches nothing, a pattern is no
            regular expression, or a matched module cannot hold an adapter.
    """
    modules = own_modules(model)
    names = _select(modules, spec.targets, spec.field, model, spec)
    if spec.exclude is not None:
        excluded = set(_select(modules, spec.exclude, "exclude", model, spec))
        names = [name for name in names if name not in excluded]
    if spec.layers is not None:
        names = [name for name in names if _layer_number(name) in spec.layers]
    if not names:
        raise ValueError(
            f"no module is left to adapt: targets={shown(spec.targets)}, "
            f"exclude={shown(spec.exclude)}, layers={shown(spec.layers)} leave nothing. "
            f"{_nearest(str(spec.targets)[:200], modules, spec)}"
        )
    unfit = [name for name in names if not spec.fits(modules[name])]
    if unfit:
        kind = type(modules[unfit[0]]).__name__
        raise ValueError(
            f"{spec.field}={shown(spec.targets)} matches {unfit[0]!r}, a {kind}, which cannot "
            f"hold a {type(spec).__name__} adapter{_why(modules[unfit[0]])}. "
            f"{_nearest('', modules, spec)}"
        )
    selected = spec.select(names)
    if not selected:
        raise ValueError(
            f"no module is left to adapt: all {len(names)} that targets={shown(spec.targets)} "
            "matches are trained whole (modules_to_save)"
        )
    return selected


def shortest_targets(model: nn.Module, names: list[str]) -> str | list[str]:
    """Return the shortest targets that mean exactly ``names``.

    Last parts if they suffice, else whole names; an expression if another name ends in one.
    """
    modules, wanted = own_modules(model), set(names)
    last = {name.rpartition(".")[2] for name in names}
    if {name for name in modules if name.rpartition(".")[2] in last} == wanted:
        return sorted(last)
    if {name for name in modules if not wanted.isdisjoint(_endings(name))} == wanted:
        return sorted(wanted)
    return "|".join(map(re.escape, sorted(names)))


def _select(
    modules: dict[str, nn.Module],
    wanted: str | list[str] | tuple[str, ...],
    field: str,
    model: nn.Module,
    spec: Part,
) -> list[str]:
    if isinstance(wanted, tuple):
        meant = set(wanted)
        return [name for name in modules if name in meant]
    if wanted == "all":
        return [name for name, module in modules.items() if spec.fits(module)]
    if wanted == "all-linear":
        heads = {
            id(module.get_output_embeddings())
            for module in model.modules()  # the language model may be wrapped in something else
            if isinstance(module, PreTrainedModel)
        }
        linear = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads
        }
        names = [name for name, module in linear.items() if spec.fits(module)]
        other = [n for n, module in linear.items() if n not in names and foreign_forward(module)]
        if other:
            log.warning(
                "all-linear leaves out %d layers, such as %r, a %s%s",
                len(other), other[0], type(linear[other[0]]).__name__, _why(linear[other[0]]),
            )  # fmt: skip
        return names
    if isinstance(wanted, str):
        check_pattern(wanted, field)
        names = [name for name in modules if matches(wanted, name, field)]
        if not names:
            raise ValueError(
                f"{field}={shown(wanted)} matches no module. A string is a regular expression for "
                "the whole dotted name; write a list for name endings. "
                f"{_nearest(wanted, modules, spec)}"
            )
        return names
    asked = set(wanted)
    met = {name: asked.intersection(_endings(name)) for name in modules}
    known = set().union(*met.values())
    for entry in wanted:
        if entry not in known:
            raise ValueError(
                f"{field} entry {shown(entry)} matches no module. {_nearest(entry, modules, spec)}"
            )
    return [name for name, entries in met.items() if entries]


def _why(layer: nn.Module) -> str:
    """The reason why ``layer`` cannot hold an adapter, where it does not look like one."""
    reason = foreign_forward(layer)
    return f": {reason}" if reason else ""


def _endings(name: str) -> Iterator[str]:
    """The dotted name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


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
