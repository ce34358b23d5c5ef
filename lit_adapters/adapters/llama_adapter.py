"""LLaMA-Adapter: gated attention to learned prompts in the top layers (arXiv 2303.16199)."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from lit_adapters.adapters.attention import is_half_rotary, named_inputs, queries, split_heads
from lit_adapters.adapters.base import Adapted, Adapter, AdapterSpec
from lit_adapters.adapters.fields import read_field, shown


@dataclass(frozen=True)
class LLaMAAdapter(AdapterSpec):
    """Attention to learned prompts beside the attention to tokens, closed by a gate at the start.

    ``y = softmax(q k^T) v + tanh(g) softmax(q k_p^T / sqrt(head_dim)) v_p``, before ``o_proj``,
    where ``k_p`` and ``v_p`` are the frozen projections of the prompts.

    Args:
        prompt_length: K, prompts per layer.
        top_layers: L, the number of attention modules that get prompts, counted from the output.
        gate: ``"per-head"`` is the paper's, ``tanh`` of one gate per head; ``"scalar"`` is PEFT's,
            one plain factor per layer.
        targets: A regular expression for whole dotted names, or a list of name endings, of the
            attention modules of Llama, Mistral, Mixtral, Qwen2, Qwen3 or Gemma.
        exclude: Names to leave out: a regular expression or a list of name endings.
        layers: Keep only modules inside the decoder layers of these numbers.
    """

    # PEFT knows ADAPTION_PROMPT, which is the scalar gate, and refuses the other.
    peft_types: ClassVar[tuple[str, ...]] = ("ADAPTION_PROMPT", "LIT_LLAMA_ADAPTER")
    peft_fields: ClassVar[Set[str]] = frozenset(
        {"adapter_len", "adapter_layers", "target_modules", "gate"}
    )

    prompt_length: int = 10
    top_layers: int = 30
    gate: Literal["per-head", "scalar"] = "per-head"
    targets: str | list[str] = field(default_factory=lambda: ["self_attn"])
    exclude: str | list[str] | None = None
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_length", "top_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.gate not in ("per-head", "scalar"):
            raise ValueError(f"gate must be 'per-head' or 'scalar', got {shown(self.gate)}")

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is an attention module whose queries can be computed again."""
        return is_half_rotary(layer)

    def select(self, names: list[str]) -> list[str]:
        """Return the last ``top_layers`` names.

        Raises:
            ValueError: if there are fewer.
        """
        if len(names) < self.top_layers:
            raise ValueError(
                f"top_layers={self.top_layers}, but the targets match only {len(names)} attention "
                f"modules; set top_layers to {len(names)} or less"
            )
        return names[-self.top_layers :]

    def build(self, layer: nn.Module, name: str) -> "LLaMAAdapterLayer":
        """Return prompts and gate for ``layer``, values not yet set."""
        return LLaMAAdapterLayer(self, layer)

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of a config, PEFT's own if PEFT can say the same."""
        common = {"adapter_len": self.prompt_length, "adapter_layers": self.top_layers}
        ending = self._ending()
        biased = any(isinstance(a, LLaMAAdapterLayer) and a.output_bias for *_, a in adapted)
        if self.gate == "scalar" and ending is not None and not biased:
            return {"peft_type": "ADAPTION_PROMPT", "target_modules": ending, **common}
        return {
            "peft_type": "LIT_LLAMA_ADAPTER",
            "target_modules": targets,
            "gate": self.gate,
            **common,
        }

    def _ending(self) -> str | None:
        """The one name of all attention modules, which is all that PEFT can choose by."""
        only = self.targets[0] if isinstance(self.targets, list) and len(self.targets) == 1 else "."
        narrowed = self.exclude is not None or self.layers is not None
        return None if narrowed or "." in only else only

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LLaMAAdapter":
        """Return the settings that PEFT's config, or ours, states."""
        targets = read_field(config, "target_modules", (str, list), "self_attn")
        ours = config["peft_type"] == "LIT_LLAMA_ADAPTER"
        return cls(
            prompt_length=read_field(config, "adapter_len", int),
            top_layers=read_field(config, "adapter_layers", int),
            gate=read_field(config, "gate", str) if ours else "scalar",
            targets=targets if ours or isinstance(targets, list) else [targets],
        )


class LLaMAAdapterLayer(Adapter):
    """Prompts (K, hidden) and gate, (heads,) or (1,), of one attention module; both fp32.

    ``k_p`` and ``v_p`` come from the raw prompts: neither normed nor rotated, so that a prompt is
    equally far from every token. They are computed in every forward pass: kept, they would belong
    to the graph of a step that is over.
    """

    spec: LLaMAAdapter

    def __init__(self, spec: LLaMAAdapter, layer: Any) -> None:
        super().__init__()
        self.spec = spec
        self.output_bias = layer.o_proj.bias is not None  # PEFT 0.21 would add it twice
        heads = int(layer.q_proj.out_features) // int(layer.head_dim)
        shape = (spec.prompt_length, int(layer.q_proj.in_features))
        self.prompts = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
        gates = heads if spec.gate == "per-head" else 1
        self.gate = nn.Parameter(torch.empty(gates, dtype=torch.float32, device="meta"))

    @torch.no_grad()
    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Draw the prompts from N(0, 1) and close the gate."""
        drawn = torch.empty(self.prompts.shape, dtype=torch.float32, device="cpu")
        self.prompts.copy_(drawn.normal_(generator=generator))
        self.gate.zero_()

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Add the attention to the prompts to the first element of ``output``."""
        called = named_inputs(layer, args, kwargs)
        attended, *rest = output
        added = self._attend(layer, called["hidden_states"], *called["position_embeddings"])
        return (attended + added.to(attended.dtype), *rest)

    def _attend(self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what the prompts add to the output, (batch, length, hidden).

        The softmax is fp32, the products are in the dtype of ``hidden``. As ``o_proj`` is linear,
        it is applied to the addend alone; its bias is in the output already.
        """
        query = queries(layer, hidden, cos, sin)
        keys, values = self.prompt_keys_values(layer, hidden.dtype)
        groups = query.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        # Scaled before the product: unnormed prompts would leave fp16's range first.
        scores = (query * layer.scaling) @ keys.transpose(-1, -2)
        weights = self.factor().view(-1, 1, 1) * scores.softmax(-1, dtype=torch.float32)
        heads = weights.to(values.dtype) @ values  # (batch, heads, length, head_dim)
        added: Tensor = layer.o_proj(heads.transpose(1, 2).flatten(2))
        bias = layer.o_proj.bias
        return added if bias is None else added - bias.to(added.dtype)

    def prompt_keys_values(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``k_p`` and ``v_p``, each (kv_heads, K, head_dim)."""
        prompts = self.prompts.to(dtype)
        return split_heads(layer, layer.k_proj(prompts)), split_heads(layer, layer.v_proj(prompts))

    def factor(self) -> Tensor:
        """Return what multiplies the attention to the prompts, (heads,) or (1,)."""
        return self.gate.tanh() if self.spec.gate == "per-head" else self.gate

    def computes_like(self, other: Adapter) -> bool:
        """Return whether ``other`` has the same gate and number of prompts."""
        return (
            isinstance(other, LLaMAAdapterLayer)
            and self.spec.gate == other.spec.gate
            and self.prompts.shape == other.prompts.shape
        )

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return prompts (1, K, hidden) and gate under PEFT's names."""
        return {"adaption_prompt": self.prompts.unsqueeze(0), "adaption_gate": self.gate}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over prompts and gate."""
        self.prompts.copy_(tensors["adaption_prompt"][0])
        self.gate.copy_(tensors["adaption_gate"])

    def extra_repr(self) -> str:
        """Return the number of prompts and the kind of gate for ``print(model)``."""
        return f"prompts={self.spec.prompt_length}, gate={self.spec.gate}"
