"""A packed row computes what its sequences compute alone; a model that cannot is not packed."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lit_adapters import (
    AdapterFineTuneModule,
    BitsAndBytes,
    DoRA,
    LLaMAAdapter,
    LoRA,
    PrefixTuning,
    attach,
)
from lit_adapters import blockwise_attention as blockwise
from lit_adapters.blockwise_attention import Blocks
from lit_adapters.data import collate, sequences
from lit_adapters.gradients import mean_loss
from lit_adapters.packed_rows import keep_rows_apart
from lit_adapters.recompute import recompute_activations
from tests.models import BUILDERS, PAD, SIZES, VOCAB, _build, llama, mistral, shake

# A sequence of one token, two of the same length, and some longer than the windows below.
LENGTHS = (7, 1, 12, 4, 4, 9)
WINDOW = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}


def build(model, config, **changes):
    return _build(model, config(**{**SIZES, **changes}), 0)


MODELS = {
    **BUILDERS,
    "qwen3": partial(build, Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "gemma2": partial(build, Gemma2ForCausalLM, Gemma2Config, **WINDOW),
    "gemma3": partial(build, Gemma3ForCausalLM, Gemma3TextConfig, **WINDOW),
    "llama4": partial(  # sees chunks of its sequence, which no argument of its attention says
        build,
        *(Llama4ForCausalLM, Llama4TextConfig),
        **{"head_dim": 8, "moe_layers": [], "intermediate_size_mlp": 48},
        **{"attention_chunk_size": 3, "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "eager": partial(mistral, attn_implementation="eager"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def examples(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": i, "labels": [-100] * (len(i) // 3) + i[len(i) // 3 :]} for i in ids]


def sums(model, batch):
    """Summed loss and its gradients, by the model's own loss; one sequence or many."""
    model.zero_grad()
    loss, tokens = mean_loss(model, {"use_cache": False, **batch})
    nll = loss * tokens
    if tokens:
        nll.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    grads = {name: parameter.grad.clone() for name, parameter in trained}
    return (nll.item() if tokens else 0.0), grads


def alone(model, rows):
    """The same as `sums`, with a pass for each sequence."""
    total, grads = 0.0, {}
    for row in rows:
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        nll, found = sums(model, batch)
        total += nll
        for key, gradient in found.items():
            grads[key] = grads.get(key, 0) + gradient
    return total, grads


def off_by(mine, theirs):
    """The largest relative deviation of the loss and of any gradient."""
    (loss, grads), (expected, wanted) = mine, theirs
    assert grads.keys() == wanted.keys()
    assert len(wanted) > 3
    errors = [(grads[k] - g).norm() / g.norm().clamp(min=1e-3) for k, g in wanted.items()]
    return max(abs(loss - expected) / expected, *map(float, errors))


def adapted(name, spec=None):
    model = MODELS[name]()
    attach(model, spec or LoRA(rank=2, alpha=4, targets="all-linear"))
    return shake(model).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@every_model
def test_a_packed_row_equals_its_sequences_alone(name, checkpointing):
    model, rows = adapted(name), examples()
    expected = alone(model, rows)
    if checkpointing:
        recompute_activations(model)
    assert keep_rows_apart(model) is None
    packed = sums(model, collate(rows, PAD, packed=True))
    assert off_by(packed, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_padding_gives_the_same(name):
    model, rows = adapted(name), examples()
    assert keep_rows_apart(model) is None
    assert off_by(sums(model, collate(rows, PAD)), alone(model, rows)) < 1e-5


@every_model
def test_naive_concatenation_would_be_seen(name):
    """The same comparison, with the positions left out."""
    model, rows = adapted(name), examples()
    assert keep_rows_apart(model) is None
    batch = collate(rows, PAD, packed=True)
    del batch["position_ids"]
    assert off_by(sums(model, batch), alone(model, rows)) > 1e-2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_packed(kind, tmp_path):
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    module = AdapterFineTuneModule(
        str(tmp_path), LoRA(rank=4), quantization=BitsAndBytes(kind, skip=["lm_head"])
    )
    module.configure_model()
    assert module.packing_obstacle is None
    shake(module.model).eval()
    rows = examples()
    packed = sums(module.model, collate(rows, PAD, packed=True))
    # int8 rounds activations by the columns of all that is computed together
    assert off_by(packed, alone(module.model, rows)) < (1e-5 if kind == "nf4" else 0.1)


@pytest.mark.parametrize(
    "spec",
    [DoRA(rank=4), LLaMAAdapter(prompt_length=3, top_layers=1), LoRA(rank=4, new_tokens=["<a>"])],
    ids=lambda spec: spec.name,
)
def test_other_adapters_are_packed(spec):
    from tests.data.word_tokenizer import word_tokenizer

    model = llama(vocab_size=128)
    attach(model, spec, tokenizer=word_tokenizer() if spec.reads_text else None)
    shake(model)
    rows = examples()
    assert keep_rows_apart(model) is None
    packed, expected = sums(model, collate(rows, PAD, packed=True)), alone(model, rows)
    assert abs(packed[0] - expected[0]) / expected[0] < 1e-5
    for key, gradient in expected[1].items():
        torch.testing.assert_close(packed[1][key], gradient, rtol=1e-4, atol=1e-4)


def test_dropout_of_attention_is_applied_in_packed_rows():
    model = BUILDERS["gpt2"](attn_pdrop=0.5)
    assert keep_rows_apart(model) is None
    batch = collate(examples(), PAD, packed=True)
    losses = [mean_loss(model.train(mode), batch)[0].item() for mode in (True, True, False, False)]
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


def test_no_mask_of_the_whole_row_is_made(monkeypatch):
    """Neither a mask nor scores over all pairs of a row's tokens."""
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes.append(output.numel() if isinstance(output, torch.Tensor) else 0)
            return output

    lengths = (60, 50, 64, 40, 60, 30, 64, 64, 50)
    batch = collate(examples(lengths=lengths), PAD, packed=True)
    for model in (llama(), mistral()):
        assert keep_rows_apart(model) is None
        sizes.clear()
        with Sizes(), torch.no_grad():
            model.model(**{k: v for k, v in batch.items() if k != "labels"})
        assert 4000 < max(sizes) < sum(lengths) ** 2 / 4


def test_generation_and_padded_batches_are_as_before():
    for name, make in MODELS.items():
        model = make()
        batch = {key: collate(examples(), PAD)[key] for key in ("input_ids", "attention_mask")}
        settings = {"max_new_tokens": 6, "do_sample": False}
        left = {key: value.flip(1) for key, value in batch.items()}
        before = model(**batch).logits, model.generate(**left, **settings)
        assert keep_rows_apart(model) is None
        after = model(**batch).logits, model.generate(**left, **settings)
        assert torch.equal(before[1], after[1]), name
        torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "eager"])
def test_a_model_can_be_asked_again(name):
    """A second module around the same model."""
    model = MODELS[name]()
    assert keep_rows_apart(model) is None
    named = model.config._attn_implementation
    assert keep_rows_apart(model) is None
    assert model.config._attn_implementation == named


def test_the_name_of_the_attention_is_not_saved(tmp_path):
    model = llama()
    assert keep_rows_apart(model) is None
    model.save_pretrained(tmp_path)
    assert "blockwise" not in (tmp_path / "config.json").read_text()


CONV = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
UNFIT = {
    "recurrent": (
        partial(build, MambaForCausalLM, MambaConfig, state_size=4),
        "MambaForCausalLM mixes sequences that share a row",
    ),
    "convolution": (
        partial(build, Lfm2ForCausalLM, Lfm2Config, **CONV),
        "Lfm2ForCausalLM mixes sequences that share a row",
    ),
    "own attention": (
        partial(build, BloomForCausalLM, BloomConfig, n_head=4, n_layer=2),
        "BloomForCausalLM computes attention in a way of its own",
    ),
    "positions unsaid": (  # transformers 5.23 leaves them out when it makes this model's masks
        partial(build, GptOssForCausalLM, GptOssConfig, head_dim=8, num_local_experts=4),
        "GptOssForCausalLM mixes sequences that share a row",
    ),
    "encoder": (
        partial(build, T5ForConditionalGeneration, T5Config, decoder_start_token_id=0),
        "the model has an encoder",
    ),
    "no transformers": (lambda: nn.Linear(2, 2), "Linear is no model of transformers"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_mixes_sequences_is_left_as_it_was(name):
    make, reason = UNFIT[name]
    model = make()
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    assert reason in keep_rows_apart(model)
    if own is not None:
        assert model.config._attn_implementation == own


def test_other_reasons_not_to_pack():
    model = llama()
    attach(model, PrefixTuning(length=3))
    assert "PrefixTuning puts something before the first sequence" in keep_rows_apart(model)
    compiled = llama()
    compiled.model.layers[0].compile(backend="eager")
    assert "compiled" in keep_rows_apart(compiled)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert "no weights yet" in keep_rows_apart(empty)
    strange = llama()
    strange.config._attn_implementation = "somebodys_kernel"
    assert "'somebodys_kernel' is not known" in keep_rows_apart(strange)


def test_a_planted_leak_is_found_by_the_check(monkeypatch):
    """Attention that takes the row for one sequence; positions are right."""

    def leaking(additive, **asked):
        found = real(additive, **asked)
        return found and Blocks([(1, asked["q_length"], None)], 99, found.starts)

    real = blockwise._blocks
    monkeypatch.setattr(blockwise, "_blocks", leaking)
    model = llama()
    assert "mixes sequences" in keep_rows_apart(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_fails_on_packed_rows_is_told_why():
    model = llama()

    def forward(*args, position_ids=None, **kwargs):
        if position_ids is not None:
            raise TypeError("no positions here")
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    assert keep_rows_apart(model) == "a packed row fails with TypeError: no positions here"
    assert model.config._attn_implementation == "sdpa"


def test_flash_attention_keeps_its_own_way(monkeypatch):
    """Its kernels read packed positions; what the check needs is that nothing else mixes."""
    model = llama()
    model.config._attn_implementation = "flex_attention"
    assert keep_rows_apart(model) is None
    assert model.config._attn_implementation == "flex_attention"


def test_half_precision_is_packed():
    for dtype in (torch.bfloat16, torch.float16):
        model = mistral().to(dtype)
        assert keep_rows_apart(model) is None


def test_stock_attention_takes_the_batch_as_it_is():
    """A batch says all that a model without our attention has to know, caches included."""
    for name in ("llama", "mistral", "gpt2"):
        model, rows = adapted(name), examples()
        assert model.config.use_cache
        batch = collate(rows, PAD, packed=True)
        loss = model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
        assert loss.item() == pytest.approx(alone(model, rows)[0], rel=1e-5)


def test_the_kernel_for_all_sequences_gets_their_boundaries(monkeypatch):
    """The path of CUDA, with a stand-in for the kernel that attends sequence by sequence."""
    calls = []

    def kernel(q, k, v, starts, same, most, again, *, scale, window_size, enable_gqa):
        calls.append(window_size)
        assert starts is same
        assert most == again == starts.diff().max()
        parts = []
        for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            index = torch.arange(b - a)
            back = index[:, None] - index
            mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
            rows = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            part = nn.functional.scaled_dot_product_attention(
                *rows, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)

    for make, window in ((llama, (-1, 0)), (mistral, (4, 0))):
        model, rows = make(), examples()
        expected = alone(shake(attached(model)), rows)
        assert keep_rows_apart(model) is None
        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "_has_kernel", lambda *_: True)
            patch.setattr(blockwise, "varlen_attn", kernel)
            calls.clear()
            assert off_by(sums(model, collate(rows, PAD, packed=True)), expected) < 1e-5
        assert set(calls) == {window}


def attached(model):
    attach(model, LoRA(rank=4))
    return model


def test_batches_hold_sequences_as_they_went_in():
    rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in examples()]
    for packed in (True, False):
        parts = sequences(collate(rows, PAD, packed))
        assert [{k: v.tolist() for k, v in part.items()} for part in parts] == rows
