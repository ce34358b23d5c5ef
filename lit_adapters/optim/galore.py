"""GaLore: full weights trained through low-rank gradients, around any optimizer.

Each projected weight is replaced in the optimizer by a *shadow* of rank ``r`` that is zero between
steps. Gradients are projected into ``shadow.grad`` as they arrive and freed, those of linear layers
before they are whole; what the optimizer makes of the shadow in its step is projected back and
added to the weight (arXiv 2403.03507).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_adapters.optim.choice import check_unstepped, choose_layers
from lit_adapters.optim.decay import check_suited, decay_of
from lit_adapters.optim.exchange import average_projected
from lit_adapters.optim.galore_settings import Projection
from lit_adapters.optim.projected_linear import divert
from lit_adapters.optim.projection import Projector
from lit_adapters.optim.refresh import choose_subspaces, take_back
from lit_adapters.optim.rows import keep_own_gradient, own_rows
from lit_adapters.optim.shadow import Shadowed


class GaLoreEngine:
    """Project the weights of ``layers`` in ``optimizer`` from now on.

    Build it after the optimizer (and its schedule), before the first step. Then train as ever. When
    gradients accumulate over several backward passes, set `accumulating` to True before all but the
    last: a change of subspace waits for the whole gradient.

    - Clipping and loss scaling act on what is stepped: the shadows' gradients and the ordinary
      ones.
    - A gradient that is not finite leaves the subspace as it is; the change is made up for later.
    - The engine does the weight decay of its weights, at the optimizer's present ``lr`` and
      ``weight_decay``: after the update if decoupled (``W *= 1 - lr * weight_decay``), else by
      adding ``weight_decay * project(W)`` to the shadow's gradient just before the step.
    - Shadows are fp32 for weights in bf16, and so are the optimizer's moments. There the weight is
      updated and decayed in fp32 and rounded stochastically, once a step: rounding to the nearest
      would lose most small updates. Random bits depend on seed, name and step alone.
    - Steps without a new gradient, such as torch makes to build an optimizer's state, change
      nothing.
    - Several ranks average the projected gradients of weights that all of them hold, once a window
      and all in one; of FSDP2's weights each projects the rows it holds. New subspaces are those of
      the gradient of all ranks; as many are computed at a time as there are ranks, each by one.

    Args:
        layers: The layers whose ``weight`` is meant, by name; a tied weight counts once.
        optimizer: Any that steps by its gradients alone. Its groups stay as many as they are.
        settings: How to project.
        seed: Of random choices; the global seed if null. The same on all ranks.
        ranks: That train together: 1, or all of the default process group. Nobody else averages
            the gradients of ``layers`` whose weights each of them holds.

    Attributes:
        projected: What is projected, by name of the layer.
        ordinary: Why the other weights are not.
        active: While False, gradients and steps are left alone.
        accumulating: Whether more backward passes follow before the next step.
        pending: Whether `finish_window` has gradients to exchange, perhaps of other ranks alone.

    Raises:
        ValueError: if nothing can be projected, the optimizer is unsuited or has begun, or a weight
            is fp16. Nothing is then changed.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        optimizer: Optimizer,
        settings: Projection,
        seed: int | None = None,
        ranks: int = 1,
    ) -> None:
        check_suited(optimizer, settings.moments)
        self.decay = decay_of(optimizer) if settings.decay == "auto" else settings.decay
        self.settings = settings
        self.optimizer = optimizer
        self.seed = torch.initial_seed() if seed is None else seed
        self.ranks = ranks
        self.active = True
        self.accumulating = False
        self.pending = False
        self._arrived = False  # whether a gradient came since the last step
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        chosen, self.ordinary = choose_layers(layers, {id(p) for p in stepped}, settings)
        check_unstepped(chosen, optimizer)
        self.projected = {name: Shadowed(name, layer, settings) for name, layer in chosen.items()}
        shadows = {id(one.weight): one.shadow for one in self.projected.values()}
        beside = [p for p in stepped if id(p) not in shadows and isinstance(p, DTensor)]
        for group in optimizer.param_groups:
            group["params"] = [shadows.get(id(p), p) for p in group["params"]]
        self._hooks = [
            *(
                one.weight.register_post_accumulate_grad_hook(partial(self._take, one))
                for one in self.projected.values()
            ),
            *(
                one.shadow.register_post_accumulate_grad_hook(self._arrive)
                for one in self.projected.values()
            ),
            *(p.register_post_accumulate_grad_hook(keep_own_gradient) for p in beside),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for one in self.projected.values():
            if not one.is_cut:
                divert(one.layer, settings.rank, partial(self._subspace_of, one))

    @property
    def attached(self) -> bool:
        """Whether it is at work on the model, that is, was not removed."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Take shadows and hooks off the model. State can still be saved; steps are over."""
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for one in self.projected.values():
            one.remove()

    # --- gradients -------------------------------------------------------------------------------

    def _subspace_of(self, one: Shadowed) -> Projector | None:
        """Return what the next gradient is to be projected on; None if it is wanted whole."""
        return one.projector if self.active and not one.due else None

    def _arrive(self, shadow: Tensor) -> None:
        """Notice a gradient that came projected."""
        self._arrived = self.pending = True

    @torch.no_grad()
    def _take(self, one: Shadowed, weight: Tensor) -> None:
        """Project the gradient that has just arrived, and free it."""
        if not self.active or weight.grad is None:
            return
        gradient, weight.grad = own_rows(weight.grad), None
        if gradient.is_sparse:
            raise TypeError(
                f"the gradient of {one.name!r} is sparse, which GaLore cannot project; build the "
                "embedding with sparse=False, or leave it out"
            )
        self._arrived = self.pending = True
        if not one.due:
            one.add_gradient(one.projected(gradient))
            return
        if one.kept is None or one.shadow.grad is None:  # or `zero_grad` began the window anew
            one.kept = gradient
            one.shadow.grad = torch.zeros_like(one.shadow)
        else:
            one.kept.add_(gradient)
        if self.ranks == 1 and not self.accumulating:
            choose_subspaces([one], self.optimizer, self.ranks, self.seed)

    @torch.no_grad()
    def finish_window(self) -> None:
        """Exchange gradients, and choose the subspaces that are still due.

        To be called before clipping or unscaling, by all ranks; the optimizer's step does it at the
        latest.
        """
        if self.ranks > 1 and self.pending:
            self._arrived = average_projected(list(self.projected.values())) or self._arrived
        self.pending = False
        due = [
            one
            for one in self.projected.values()
            if one.kept is not None and one.shadow.grad is not None
        ]
        for start in range(0, len(due), self.ranks):
            turn = due[start : start + self.ranks]
            choose_subspaces(turn, self.optimizer, self.ranks, self.seed)

    def withdraw(self) -> None:
        """Forget the gradients of the present window and the subspaces chosen from them.

        To be called instead of a step.
        """
        self._arrived = self.pending = False
        for one in self.projected.values():
            one.kept = one.shadow.grad = None
            take_back(one, self.optimizer)

    # --- steps -----------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Have the shadows' gradients complete when the optimizer reads them.

        A closure makes the gradients inside the step (Lightning's also clips them), so what has to
        follow them goes into the closure.
        """
        if len(args) > 1 and args[1] is not None:
            return (args[0], partial(self._complete_after, args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": partial(self._complete_after, kwargs["closure"])}
        self._complete()
        return None

    def _complete_after(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._complete()
        return result

    @torch.no_grad()
    def _complete(self) -> None:
        if not (self.active and self._arrived):
            return
        self.finish_window()
        if self.decay == "decoupled":
            return
        # A fused step undoes the loss scaling itself, after this.
        unit = getattr(self.optimizer, "grad_scale", None)
        for one, group in self._stepped():
            decay = float(group.get("weight_decay") or 0)
            if decay and one.projector is not None:
                R = one.projected(own_rows(one.weight.detach()))
                sign = -1 if group.get("maximize") else 1
                one.add_gradient((R if unit is None else R * unit).mul_(sign * decay))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Move what the optimizer did to the shadows into the weights."""
        if not (self.active and self._arrived):
            return
        self._arrived = False
        for one in self.projected.values():
            one.replaced = None
        overflow = getattr(optimizer, "found_inf", None)  # of a fused step, which did nothing then
        if overflow is not None and overflow.item():
            return
        for one, group in self._stepped():
            decay = float(group.get("weight_decay") or 0) if self.decay == "decoupled" else 0.0
            one.move_weight(1 - float(group["lr"]) * decay if decay else 1.0, one.seed(self.seed))
            one.steps += 1
            one.age += 1

    def _stepped(self) -> Iterator[tuple[Shadowed, dict[str, Any]]]:
        """Yield the weights that step, each with its parameter group of now.

        Groups are looked up every time: loading an optimizer's state replaces them.
        """
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for one in self.projected.values():
            if one.shadow.grad is not None:
                yield one, groups[id(one.shadow)]

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return subspaces and counts: tensors and ints."""
        weights = {name: one.state() for name, one in self.projected.items()}
        return {"seed": self.seed, "update_gap": self.settings.update_gap, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; ``update_gap`` and ``scale`` stay this run's.

        Raises:
            ValueError: if other weights were projected, or to another rank or side. Nothing is then
                changed.
        """
        weights = state["weights"]
        odd = sorted(weights.keys() ^ self.projected.keys())
        if odd:
            raise ValueError(
                f"the saved state of GaLore is of other weights: {odd[0]!r} (and {len(odd) - 1} "
                "more) is projected only there or only here; give the same targets, exclude, rank "
                "and min_size"
            )
        found = {name: one.checked(weights[name]) for name, one in self.projected.items()}
        self.seed = state["seed"]
        for name, one in self.projected.items():
            one.projector, one.kept, one.replaced = found[name], None, None
            one.steps, one.age = weights[name]["steps"], weights[name]["age"]
