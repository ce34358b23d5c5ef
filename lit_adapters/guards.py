"""Stop a training that cannot come to anything: no labels, a loss that is no number, a stand."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_adapters.adapters import METHOD
from lit_adapters.attachment import adapted_layers
from lit_adapters.optim import SHADOW

PATIENCE = 10  # optimizer steps after which what came to nothing so far will not come to more


def warn_if_rounded(model: nn.Module) -> None:
    """Warn when what is trained is kept in less than fp32, as in full fine-tuning in bf16-true."""
    # GaLore rounds the weights that it projects stochastically, which loses nothing on average.
    sound = {id(m.weight) for m in model.modules() if SHADOW in m._parameters}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in sound]
    rounded = {p.dtype for p in trained} - {torch.float32}
    if rounded:
        warnings.warn(
            f"what is trained is kept in {', '.join(map(str, rounded))}, where most steps of a "
            "small learning rate are lost in rounding; full fine-tuning wants precision="
            "'bf16-mixed' or '32-true'",
            stacklevel=3,
        )


def warn_if_left_out(model: nn.Module) -> None:
    """Warn when an adapter folder will not hold all that is trained of ``model``."""
    held = {
        id(p)
        for _, layer, adapter in adapted_layers(model)
        for p in (*adapter.parameters(), *adapter.trained(layer))
    }
    loose = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in held and not name.endswith(SHADOW)
    ]
    if loose:
        warnings.warn(
            f"{loose[0]!r} and {len(loose) - 1} more of the model are trained beside the adapters: "
            "checkpoints hold them, and the adapter folder does not. To have them there, leave "
            "them frozen and name their modules in `modules_to_save`",
            stacklevel=3,
        )


def check_loss(loss: float, step: int) -> None:
    """Refuse to step on a loss that is NaN or infinite.

    Args:
        loss: Mean loss of the optimizer step to be made, nats per token.
        step: Optimizer steps made so far.

    Raises:
        RuntimeError: saying what usually helps.
    """
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the training loss is {loss} after {step} optimizer steps, and a step would "
            "ruin the adapter; the last checkpoint holds the state before. Lower the learning "
            "rate, set gradient_clip_val, or take bf16 instead of fp16"
        )


def check_tokens(tokens: float, step: int) -> None:
    """Refuse an optimizer step in which nothing was trained.

    Args:
        tokens: Trained tokens of the step, summed over its micro-batches and all ranks; a rank or
            a micro-batch may have none.
        step: Optimizer steps made so far.

    Raises:
        RuntimeError: saying what to look at.
    """
    if tokens == 0:
        raise RuntimeError(
            f"no token of optimizer step {step + 1} is trained: every label after the first "
            "position of its batches is -100. Look at batch['labels']: the answer's tokens must "
            "keep their ids there. The usual causes are a collate function that masks too much, "
            "and prompts so long that truncation leaves no answer (raise max_length, or drop them)"
        )


def check_gradients(gradients: Sequence[Tensor]) -> None:
    """Refuse to step when no parameter of the optimizer has a gradient.

    Raises:
        RuntimeError: with the usual causes.
    """
    if not gradients:
        raise RuntimeError(
            "no parameter of the optimizer got a gradient. Was it built from other parameters than "
            "parameter_groups(model)? Does the loss depend on the adapters (reentrant gradient "
            "checkpointing over a frozen base wants model.enable_input_require_grads())?"
        )


def check_moved(model: nn.Module, rate: float) -> None:
    """Make sure that training moves at least one adapter; call it after `PATIENCE` steps.

    Args:
        model: Holds the adapters.
        rate: The learning rate now, for the message.

    Raises:
        RuntimeError: if every low-rank product is still exactly zero, as it was at the start.
    """
    adapters = [adapter for *_, adapter in adapted_layers(model, METHOD)]
    if adapters and all(adapter.unmoved() for adapter in adapters):
        raise RuntimeError(
            f"after {PATIENCE} optimizer steps every lora_B is still zero, so nothing is learned "
            f"(learning rate {rate:g}). Is the rate too small for the steps to show, or are the "
            "gradients of the adapters zero?"
        )
