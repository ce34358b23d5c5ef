"""A training step of the real module, optimizer and loss on a model that has shapes only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.adapters import Adapter
from lit_adapters.data.batches import collate
from lit_adapters.data.tokens import Tokens
from lit_adapters.estimate.memory_trace import Category, MemoryTrace, Peak
from lit_adapters.estimate.shapes import Training, built_with_shapes
from lit_adapters.losses import tokens_per_chunk
from lit_adapters.model_loss import stated_shape
from lit_adapters.optim import SHADOW, GaLoreEngine, build_optimizer
from lit_adapters.optim.shadow import Shadowed
from lit_adapters.targets import match_targets
from lit_adapters.weights import side_tensors

CHUNKS = 16  # of tokens that the loss scores at a time


class Rehearsal:
    """A model of shapes, built and adapted, whose training step can be run at any batch size."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.trace = MemoryTrace()
        module = built_with_shapes(training, self.trace)
        model: Any = module.model
        module.model_loss.shape = stated_shape(model)
        head = model.get_output_embeddings()
        module.model_loss.chunk = tokens_per_chunk(len(head.weight), training.device)
        self.module, self.model = module, model
        # Larger micro-batches repeat what the loss does with a chunk, and nothing else is new.
        self.farthest = CHUNKS * module.model_loss.chunk // training.max_length

    def run(self, batch_size: int, groups: Sequence[Sequence[nn.Module]] = ()) -> dict[Any, Peak]:
        """Make two optimizer steps, and return the peaks of the parts of the second.

        A part is a pair: a stage, which is forward, loss, backward or step, and in forward and
        backward which group of layers is at work: first, between or last.

        Args:
            batch_size: Sequences of the micro-batch.
            groups: The layers of the model, in their order.
        """
        trace, training, model = self.trace, self.training, self.model
        trace.restart()
        tokens = Tokens(input_ids=[0] * training.max_length, labels=[0] * training.max_length)
        batch = collate([tokens] * batch_size, pad_id=0)
        self._assign_model()
        with trace:
            optimizer, engine = self._optimizer()
            trained = [
                p
                for n, p in model.named_parameters()
                if p.requires_grad and n.rpartition(".")[2] != SHADOW
            ]
            torch.autograd.backward(trained, [torch.empty_like(p) for p in trained])
            optimizer.step()
            optimizer.zero_grad()
            trace.assign(state_of(optimizer, engine), "optimizer")
            if engine is not None:
                for one in engine.projected.values():
                    one.age = engine.settings.update_gap  # the step with most memory
            trace.peaks.clear()
            with self._marked(groups, engine):
                self._step(batch, optimizer, engine)
            if engine is not None:
                engine.remove()
        return trace.peaks

    def _step(self, batch: Any, optimizer: Optimizer, engine: GaLoreEngine | None) -> None:
        """What Lightning does in a step of our module, which then frees the gradients."""
        trace, training = self.trace, self.training
        last = min(2, training.accumulate) - 1
        for index in range(last + 1):
            if engine is not None:
                engine.accumulating = index < last
            trace.enter(("forward", "start"), "activations")
            with precision_context(training.precision):
                loss = self.module.training_step(batch, index)
            (loss / training.accumulate).backward()
            del loss
        trace.enter(("step", ""), "workspace")
        if engine is not None:
            engine.finish_window()
        gradients = gradients_of(optimizer)
        trace.assign(gradients, "gradients")
        torch._foreach_mul_(gradients, 1.0)
        nn.utils.get_total_norm(gradients)
        if training.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _optimizer(self) -> tuple[Optimizer, GaLoreEngine | None]:
        module, galore = self.module, self.training.galore
        optimizer = build_optimizer(
            module.optimizer_factory,
            self.model,
            module.lora_plus_ratio,
            module.embedding_lr,
            fused=self.training.precision != "16-mixed",
        )
        if galore is None:
            return optimizer, None
        names = match_targets(self.model, galore.selection)
        layers = {name: self.model.get_submodule(name) for name in names}
        return optimizer, GaLoreEngine(layers, optimizer, galore.settings, seed=0)

    def _assign_model(self) -> None:
        model, assign = self.model, self.trace.assign
        own = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
        for parameter in model.parameters():
            trained = parameter.requires_grad or id(parameter) in own
            assign([parameter], "adapter" if trained else "base")
        for layer in model.modules():
            assign(side_tensors(layer), "base")
        assign(model.buffers(), "workspace")

    @contextmanager
    def _marked(
        self, groups: Sequence[Sequence[nn.Module]], engine: GaLoreEngine | None
    ) -> Iterator[None]:
        """Tell the trace which part of the step is being computed."""
        trace, handles = self.trace, []

        def mark(part: Any, category: Category, *_: Any) -> None:
            trace.enter(part, category)

        def forward(place: str, layer: nn.Module, inputs: Any) -> None:
            if trace.part[0] == "forward":  # and not recomputing
                mark(("forward", place), "activations")

        def ahead(place: str, layer: nn.Module, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if state.requires_grad:
                state.register_hook(partial(mark, ("backward", place), "workspace"))

        for index, layer in ((i, layer) for i, group in enumerate(groups) for layer in group):
            place = "first" if index == 0 else "last" if index == len(groups) - 1 else "between"
            handles += [
                layer.register_forward_pre_hook(partial(forward, place)),
                layer.register_forward_hook(partial(ahead, place)),
            ]
        handles.append(
            self.model.base_model.register_forward_hook(partial(mark, ("loss", ""), "logits"))
        )
        projected = {id(one.weight): one for one in engine.projected.values()} if engine else {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # after GaLore's own hook, which takes it at once
                hook = partial(self._arrived, projected.get(id(parameter)))
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _arrived(self, one: Shadowed | None, parameter: Tensor) -> None:
        found = (parameter.grad,) if one is None else (one.shadow.grad, one.kept)
        self.trace.assign((g for g in found if g is not None), "gradients")


@contextmanager
def precision_context(precision: str) -> Iterator[None]:
    """Compute as the trainer's precision plugin lets a module compute."""
    if precision.endswith("-mixed"):
        with torch.autocast("cpu", dtype=torch.bfloat16 if precision[0] == "b" else torch.float16):
            yield
    elif precision in ("bf16-true", "16-true"):
        with HalfPrecision(cast(Any, precision)).forward_context():
            yield
    else:
        yield


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that a step would use."""
    groups = optimizer.param_groups
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def state_of(optimizer: Optimizer, engine: GaLoreEngine | None) -> Iterator[Tensor]:
    """Yield the optimizer's tensors, and those of GaLore."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for one in engine.projected.values() if engine else ():
        yield one.shadow
        assert one.projector is not None
        yield from (basis for basis in one.projector if basis is not None)
