"""Each row of PEFT's file format: exact keys, shapes and dtypes as each side writes them, and read.

PEFT is asked first what it writes, so that a later PEFT that writes something else is noticed here.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_adapters import (
    DoRA,
    LLaMAAdapter,
    LoRA,
    PrefixTuning,
    attach,
    load_adapter,
    save_adapter,
)
from tests.models import batch, gpt2, llama, llama_tied, logits, shake, snapshot
from tests.reference import OneLayer

peft = pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
HERE = {f.name for f in fields(LoRA)}
P = "base_model.model."
Q, V = (f"{P}model.layers.0.self_attn.{name}." for name in ("q_proj", "v_proj"))
C = f"{P}transformer.h.0.attn.c_attn."
EMBED, HEAD, LAYER = f"{P}model.embed_tokens.", f"{P}lm_head.", f"{P}layer."
DELTA = "token_adapter.trainable_tokens_delta"  # absolute rows, whatever the name says

IDS = (
    batch()["input_ids"][0].unique()[:3].flip(0).tolist()
)  # not ascending: the order is the file's

Shapes = dict[str, tuple[int, ...]]


def convolution(kind: type[nn.Module], inputs: int = 3, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return OneLayer(kind(inputs, 8, 3, **settings)).eval()

    return build


@dataclass(frozen=True)
class Row:
    """One thing that PEFT can be asked for, and the tensors that it writes."""

    id: str
    build: Callable[[], nn.Module]
    theirs: Any
    keys: Shapes
    ours: Any = None  # the same here; None: there is no such setting
    also: Shapes = field(default_factory=dict)  # frozen weights that only PEFT writes
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # where not fp32
    refused: str = ""  # what a refusal of PEFT's folder names

    @property
    def lacking(self) -> set[str]:
        """Fields that LoRA would need for it and has not."""
        asked = {
            "modules_to_save": getattr(self.theirs, "modules_to_save", None),
            "bias": getattr(self.theirs, "bias", "none") != "none",
            "new_tokens": getattr(self.theirs, "trainable_token_indices", None),
        }
        return {name for name, value in asked.items() if value} - HERE


def low_rank(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})


def factors(at: str, rank: int, inputs: int, out: int, magnitude: bool = False) -> Shapes:
    keys: Shapes = {f"{at}lora_A.weight": (rank, inputs), f"{at}lora_B.weight": (out, rank)}
    return keys | ({f"{at}lora_magnitude_vector": (out,)} if magnitude else {})


def answer(model: nn.Module) -> Tensor:
    layer = next((m for m in model.modules() if hasattr(m, "kernel_size")), None)
    if layer is None:
        return logits(model)
    sizes = [2, layer.in_channels, *([6] * len(layer.kernel_size))]
    return model(torch.randn(sizes, generator=torch.Generator().manual_seed(5))).detach()


FIRST = {"targets": ["q_proj", "v_proj"], "layers": [0]}
THEIR_FIRST = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}


def _low_rank_rows(method: type[LoRA]) -> list[Row]:
    """The rows that LoRA and DoRA share, which differ by the magnitudes."""
    dora = method is DoRA
    name = method.__name__.lower()

    def row(id: str, build: Any, targets: dict, theirs: dict, keys: Shapes, **rest: Any) -> Row:
        ours = method(rank=4, alpha=6, **targets)
        return Row(
            f"{name}-{id}", build, low_rank(use_dora=dora, **theirs), keys, ours=ours, **rest
        )

    def kernels(dimensions: int) -> Shapes:
        ones = (1,) * dimensions
        keys = {
            f"{LAYER}lora_A.weight": (4, 3, *(3,) * dimensions),
            f"{LAYER}lora_B.weight": (8, 4, *ones),
        }
        return keys | ({f"{LAYER}lora_magnitude_vector": (1, 8, *ones)} if dora else {})

    embedding: Shapes = {f"{EMBED}lora_embedding_A": (4, 72), f"{EMBED}lora_embedding_B": (32, 4)}
    if dora:
        embedding[f"{EMBED}lora_magnitude_vector"] = (32,)
    return [
        row(
            "linear",
            llama,
            FIRST,
            THEIR_FIRST,
            factors(Q, 4, 32, 32, dora) | factors(V, 4, 32, 16, dora),
        ),
        row(
            "ranks",
            llama,
            {**FIRST, "rank_pattern": {"v_proj": 2}},
            {**THEIR_FIRST, "rank_pattern": {"v_proj": 2}},
            factors(Q, 4, 32, 32, dora) | factors(V, 2, 32, 16, dora),
        ),
        row(
            "conv1d-hf",
            gpt2,
            {"targets": ["c_attn"], "layers": [0]},
            {"target_modules": ["c_attn"], "layers_to_transform": [0], "fan_in_fan_out": True},
            factors(C, 4, 32, 96, dora),
        ),
        row(
            "embedding",
            llama,
            {"targets": ["embed_tokens"]},
            {"target_modules": ["embed_tokens"]},
            embedding,
            also={f"{EMBED}base_layer.weight": (72, 32)},
        ),
        row(
            "head",
            llama,
            {"targets": ["lm_head"]},
            {"target_modules": ["lm_head"]},
            factors(HEAD, 4, 32, 72, dora),
            also={f"{HEAD}base_layer.weight": (72, 32)},
        ),
        *(
            row(
                kind.__name__.lower(),
                convolution(kind),
                {"targets": ["layer"]},
                {"target_modules": ["layer"]},
                kernels(dimensions),
            )
            for dimensions, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
        ),
    ]


def _companions() -> list[Row]:
    """What is trained beside the factors: whole modules, biases, rows of the embedding."""
    lora = factors(Q, 4, 32, 32)
    first, theirs = {"targets": ["q_proj"], "layers": [0]}, {"layers_to_transform": [0]}
    theirs["target_modules"] = ["q_proj"]
    gpt2_first = {"target_modules": ["c_attn"], "layers_to_transform": [0], "fan_in_fan_out": True}
    conv1d = factors(C, 4, 32, 96)
    biases = {
        f"{P}transformer.h.{layer}.{name}.bias": (size,)
        for layer in (0, 1)
        for name, size in {
            "ln_1": 32,
            "attn.c_attn": 96,
            "attn.c_proj": 32,
            "ln_2": 32,
            "mlp.c_fc": 48,
            "mlp.c_proj": 32,
        }.items()
        if (layer, name) != (0, "attn.c_attn")
    }
    biases |= {f"{P}transformer.ln_f.bias": (32,), f"{C}base_layer.bias": (96,)}

    def here(**settings: Any) -> LoRA | None:
        known = settings.keys() <= HERE
        return LoRA(rank=4, alpha=6, **first, **settings) if known else None

    def here_gpt2(**settings: Any) -> LoRA | None:
        known = settings.keys() <= HERE
        return LoRA(rank=4, alpha=6, targets=["c_attn"], layers=[0], **settings) if known else None

    def row(id: str, build: Any, asked: dict, keys: Shapes, ours: Any = None, **rest: Any) -> Row:
        return Row(id, build, low_rank(**theirs, **asked), lora | keys, ours=ours, **rest)

    def gpt2_row(id: str, asked: dict, keys: Shapes, ours: Any = None) -> Row:
        return Row(id, gpt2, low_rank(**gpt2_first, **asked), conv1d | keys, ours=ours)

    one_head: Shapes = {f"{HEAD}weight": (72, 32)}
    one_embedding: Shapes = {f"{EMBED}weight": (72, 32)}
    return [
        row(
            "saved-head",
            llama,
            {"modules_to_save": ["lm_head"]},
            one_head,
            here(modules_to_save=["lm_head"]),
        ),
        row(
            "saved-norms",
            llama,
            {"modules_to_save": ["model.norm", "0.input_layernorm"]},
            {
                f"{P}model.norm.weight": (32,),
                f"{P}model.layers.0.input_layernorm.weight": (32,),
            },
            here(modules_to_save=["model.norm", "0.input_layernorm"]),
        ),
        row(
            "saved-block",
            llama,
            {"modules_to_save": ["layers.1.mlp"]},
            {
                f"{P}model.layers.1.mlp.gate_proj.weight": (48, 32),
                f"{P}model.layers.1.mlp.up_proj.weight": (48, 32),
                f"{P}model.layers.1.mlp.down_proj.weight": (32, 48),
            },
            here(modules_to_save=["layers.1.mlp"]),
        ),
        row(
            "saved-head-and-embedding",
            llama,
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            one_head | one_embedding,
            here(modules_to_save=["lm_head", "embed_tokens"]),
        ),
        row("saved-head-tied", llama_tied, {"modules_to_save": ["lm_head"]}, one_head),
        row(
            "saved-embedding-tied", llama_tied, {"modules_to_save": ["embed_tokens"]}, one_embedding
        ),
        row(
            "saved-pair-tied",
            llama_tied,
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            one_head | one_embedding,
            refused="ensure_weight_tying",
        ),
        row(
            "saved-head-bf16",
            lambda: llama().bfloat16(),
            {"modules_to_save": ["lm_head"]},
            one_head,
            dtypes={f"{HEAD}weight": torch.bfloat16},
        ),
        row(
            "tokens-list",
            llama,
            {"trainable_token_indices": IDS},
            {f"{EMBED}{DELTA}": (3, 32)},
        ),
        row(
            "tokens-embedding-and-head",
            llama,
            {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
            {f"{EMBED}{DELTA}": (3, 32), f"{HEAD}{DELTA}": (3, 32)},
            here(new_tokens=IDS),
        ),
        row(
            "tokens-head",
            llama,
            {"trainable_token_indices": {"lm_head": IDS[:2]}},
            {f"{HEAD}{DELTA}": (2, 32)},
        ),
        row(
            "tokens-unlike-lists",
            llama,
            {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS[:1]}},
            {f"{EMBED}{DELTA}": (3, 32), f"{HEAD}{DELTA}": (1, 32)},
            refused="trainable_token_indices",
        ),
        row(
            "tokens-tied",
            llama_tied,
            {"trainable_token_indices": IDS},
            {f"{EMBED}{DELTA}": (3, 32)},
            here(new_tokens=IDS),
        ),
        row(
            "tokens-tied-twice",
            llama_tied,
            {"trainable_token_indices": {"embed_tokens": IDS[:2], "lm_head": IDS[:2]}},
            {f"{EMBED}{DELTA}": (2, 32)},
        ),
        row(
            "tokens-bf16",
            lambda: llama().bfloat16(),
            {"trainable_token_indices": IDS[:2]},
            {f"{EMBED}{DELTA}": (2, 32)},
        ),
        gpt2_row(
            "bias-adapter",
            {"bias": "lora_only"},
            {f"{C}base_layer.bias": (96,)},
            here_gpt2(bias="adapter"),
        ),
        gpt2_row("bias-all", {"bias": "all"}, biases, here_gpt2(bias="all")),
        gpt2_row(
            "tokens-gpt2",
            {"trainable_token_indices": IDS[:2]},
            {f"{P}transformer.wte.{DELTA}": (2, 32)},
            here_gpt2(new_tokens=IDS[:2]),
        ),
        row(
            "lora-bias",
            llama,
            {"lora_bias": True},
            {f"{Q}lora_B.bias": (32,)},
            refused="lora_bias",
        ),
        Row(
            "parameters",
            llama,
            low_rank(target_modules=[], target_parameters=["layers.0.self_attn.v_proj.weight"]),
            factors(V, 4, 32, 16),
            refused="target_parameters",
        ),
        Row(
            "groups",
            convolution(nn.Conv2d, inputs=8, groups=4),
            low_rank(target_modules=["layer"]),
            {f"{LAYER}lora_A.weight": (4, 8, 3, 3), f"{LAYER}lora_B.weight": (8, 1, 1, 1)},
            refused="padding mode, dilation and groups",
        ),
    ]


ROWS = [
    *_low_rank_rows(LoRA),
    *_low_rank_rows(DoRA),
    Row(
        "llama-adapter",
        llama,
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
        {
            f"{P}model.layers.1.self_attn.adaption_prompt": (1, 3, 32),
            f"{P}model.layers.1.self_attn.adaption_gate": (1,),
        },
        ours=LLaMAAdapter(prompt_length=3, top_layers=1, gate="scalar"),
    ),
    Row(
        "prefix",
        llama,
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        {"prompt_embeddings": (3, 2 * 2 * 2 * 8)},  # layers, key and value, heads, width of one
        ours=PrefixTuning(length=3),
    ),
    *_companions(),
]


def rows(these: list[Row], skip: bool = True) -> pytest.MarkDecorator:
    """Parametrise with rows; those whose setting LoRA lacks are skipped."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row,
                id=row.id,
                marks=pytest.mark.skipif(
                    skip and bool(row.lacking), reason=f"LoRA has no field {row.lacking}"
                ),
            )
            for row in these
        ],
    )


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def saved_by_peft(row, folder):
    base = row.build()
    theirs = shake(quietly(lambda: peft.get_peft_model(base, row.theirs)).eval(), std=0.3)
    quietly(lambda: theirs.save_pretrained(str(folder)))
    return theirs


def written(folder):
    """Shapes and dtypes in a folder's file."""
    with safe_open(folder / WEIGHTS, framework="pt") as reader:
        assert reader.metadata()["format"] == "pt"
    tensors = load_file(folder / WEIGHTS)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return shapes, {key: value.dtype for key, value in tensors.items()}


def close(row, found, expected):
    if any(parameter.dtype == torch.bfloat16 for parameter in row.build().parameters()):
        error, size = (found - expected).abs().mean(), expected.abs().mean()
        assert error < 1e-2 * size  # bf16 rounds at 4e-3 of a value, here once more in our fp32
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@rows(ROWS, skip=False)
def test_what_peft_writes(row, tmp_path):
    saved_by_peft(row, tmp_path)
    shapes, dtypes = written(tmp_path)
    assert shapes == row.keys | row.also
    assert dtypes == {key: row.dtypes.get(key, torch.float32) for key in shapes}


@rows([row for row in ROWS if not row.refused])
def test_what_peft_writes_gives_its_output_here(row, tmp_path):
    expected, ours = answer(saved_by_peft(row, tmp_path)), row.build()
    assert (expected - answer(ours)).abs().max() > 2e-2
    load_adapter(ours, tmp_path)
    close(row, answer(ours.eval()), expected)


@rows([row for row in ROWS if row.refused], skip=False)
def test_what_peft_writes_and_has_no_meaning_here_is_refused_by_name(row, tmp_path):
    saved_by_peft(row, tmp_path)
    ours = row.build()
    before = snapshot(ours)
    with pytest.raises(ValueError, match="modules_to_save" if row.lacking else row.refused):
        load_adapter(ours, tmp_path)
    assert snapshot(ours) == before


@rows([row for row in ROWS if row.ours is not None])
def test_what_we_write_is_that_and_gives_our_output_there(row, tmp_path):
    ours = row.build()
    attach(ours, row.ours, seed=0)
    shake(ours, std=0.3)
    assert (answer(ours) - answer(row.build())).abs().max() > 2e-2
    save_adapter(ours, tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind == row.theirs.peft_type.value
    shapes, dtypes = written(tmp_path)
    assert shapes == row.keys
    assert set(dtypes.values()) == {torch.float32}
    base = row.build()
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(base, str(tmp_path))).eval()
    close(row, answer(theirs), answer(ours))


# ---------------------------------------------------------------- rows that hold no adapter


def resized():
    model, state = llama(), torch.get_rng_state()
    torch.manual_seed(0)
    model.resize_token_embeddings(80)
    torch.set_rng_state(state)
    return model


def test_peft_writes_a_resized_vocabulary_only_if_told_and_it_must_be_the_bases(tmp_path):
    base, config = resized(), low_rank(target_modules=["q_proj"], layers_to_transform=[0])
    theirs = shake(quietly(lambda: peft.get_peft_model(base, config)).eval())
    quietly(lambda: theirs.save_pretrained(str(tmp_path / "auto")))
    quietly(lambda: theirs.save_pretrained(str(tmp_path / "told"), save_embedding_layers=True))
    lora = factors(Q, 4, 32, 32)
    assert written(tmp_path / "auto")[0] == lora
    assert written(tmp_path / "told")[0] == lora | {
        f"{EMBED}weight": (80, 32),
        f"{HEAD}weight": (80, 32),
    }
    ours = resized()
    load_adapter(ours, tmp_path / "auto")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    smaller = llama()
    before = snapshot(smaller)
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight"):
        load_adapter(smaller, tmp_path / "told")
    assert snapshot(smaller) == before


def test_peft_writes_the_buffers_of_a_saved_batch_norm(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(10, 8))
    base.add_module("norm", nn.BatchNorm1d(8))
    config = low_rank(target_modules=["layer"], modules_to_save=["norm"])
    quietly(lambda: peft.get_peft_model(base, config)).save_pretrained(str(tmp_path))
    shapes, dtypes = written(tmp_path)
    eight = ("weight", "bias", "running_mean", "running_var")
    norm: Shapes = {f"{P}norm.{name}": (8,) for name in eight}
    norm[f"{P}norm.num_batches_tracked"] = ()
    assert shapes == factors(LAYER, 4, 10, 8) | norm
    assert dtypes.pop(f"{P}norm.num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {torch.float32}


def test_peft_writes_attention_under_two_names(tmp_path):
    base = nn.Sequential()
    base.add_module("layer", nn.MultiheadAttention(12, 2))
    config = low_rank(target_modules=["layer"])
    quietly(lambda: peft.get_peft_model(base, config)).save_pretrained(str(tmp_path))
    inside = f"{LAYER}base_layer.out_proj."
    assert written(tmp_path)[0] == factors(LAYER, 4, 12, 36) | factors(inside, 4, 12, 12)
