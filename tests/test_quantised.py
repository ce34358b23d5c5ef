"""Quantised bases: what is stored, what adapters compute beside it, and that it never changes."""

import copy
import importlib.util
import io
import json
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lit_adapters import (
    AdapterFineTuneModule,
    BitsAndBytes,
    DoRA,
    FullFineTuning,
    Gaussian,
    LLaMAAdapter,
    LoRA,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    PrefixTuning,
    attach,
    detach,
    export_merged,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.base_model import load_base
from lit_adapters.data import collate
from lit_adapters.fingerprint import fingerprint, same_base
from lit_adapters.footprint import footprint
from lit_adapters.recompute import recompute_activations
from lit_adapters.saved_settings import trusted_settings
from lit_adapters.trained_state import keep_trained
from lit_adapters.weights import (
    hush,
    is_plain,
    matrix_shape,
    read_weight,
    requantise,
    rounded,
    rounding,
    settle,
    side_tensors,
    weight_blocks,
    write_weight,
)
from tests.models import PAD, VOCAB, assert_base_again, batch, gpt2, llama, logits, qwen2, shake

hush()
bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # PEFT 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # Every batch of these tests is the same one.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

# Rows of 32 and 96 numbers: blocks of 64 do not end where rows do.
FAMILIES = {
    "llama": partial(llama, intermediate_size=96),
    "gpt2": partial(gpt2, n_inner=96),
    "qwen2": partial(qwen2, intermediate_size=96),
}
KINDS = ["nf4", "fp4", "int8"]
PRECISIONS = ["32-true", "bf16-true", "bf16-mixed"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The tiny models as folders, for `load_base`."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def folder(family, seed=0):
        path = root / f"{family}-{seed}"
        FAMILIES[family](seed).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture
def quantised(folders):
    def load(family="llama", kind="nf4", seed=0, **more):
        return load_base(folders(family, seed), quantization=kind, **more)

    return load


def packed(model):
    """Bytes of every packed weight and what belongs to it, by layer."""
    return {
        name: [
            t.detach().contiguous().view(-1).view(torch.uint8).clone()
            for t in (layer.weight.data, *side_tensors(layer))
        ]
        for name, layer in model.named_modules()
        if not is_plain(layer)
    }


def same(before, after):
    assert before.keys() == after.keys()
    assert before
    for name, tensors in before.items():
        for one, other in zip(tensors, after[name], strict=True):
            assert torch.equal(one, other), name


def dense_copy(model, family="llama", seed=0):
    """The stock model with the numbers that a quantised one holds."""
    dense = FAMILIES[family](seed)
    for name, layer in model.named_modules():
        if not is_plain(layer):
            write_weight(dense.get_submodule(name), read_weight(layer))
    return dense


def four_bit(shape=(48, 64), seed=0, **settings):
    torch.manual_seed(seed)
    dense = nn.Linear(shape[1], shape[0])
    settings = {"quant_type": "nf4", "compute_dtype": torch.float32, **settings}
    layer = bnb.nn.Linear4bit(shape[1], shape[0], **settings)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")
    settle(layer)
    return dense, layer


# ---------------------------------------------------------------- NF4 itself


def nf4_codebook():
    """16 quantiles of the standard normal, 8 above zero and 7 below, scaled to [-1, 1]."""
    offset = 0.9677083
    # As bitsandbytes made it: probabilities in fp32, quantiles in fp64.
    above, below = (torch.linspace(offset, 0.5, n)[:-1].double() for n in (9, 8))
    quantiles = torch.cat([torch.special.ndtri(above), -torch.special.ndtri(below)])
    return (torch.cat([quantiles, torch.zeros(1)]).sort().values / quantiles.max()).float()


def test_the_codebook_is_made_of_normal_quantiles():
    _, layer = four_bit()
    torch.testing.assert_close(layer.weight.quant_state.code, nf4_codebook(), rtol=0, atol=1e-7)


def test_what_is_read_is_the_nearest_number_of_each_block_to_the_bit():
    dense, layer = four_bit((64, 128), compress_statistics=False)
    code = layer.weight.quant_state.code
    blocks = dense.weight.detach().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(code).abs().argmin(-1)
    assert torch.equal(read_weight(layer), (code[nearest] * scale).view(64, 128))


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_parameter_counted_from_what_is_stored(double, bits):
    _, layer = four_bit((1024, 1024), compress_statistics=double)
    stored = layer.weight.data.nbytes + sum(t.nbytes for t in side_tensors(layer))
    assert 8 * stored / 1024**2 == pytest.approx(bits, abs=1e-3)
    sizes = footprint(layer.requires_grad_(False))
    assert sizes.total == 1024**2 + 1024
    assert sizes.base_bytes == stored + layer.bias.nbytes


def test_errors_on_normal_weights_rank_as_the_paper_says():
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    scale = W.view(-1, 64).abs().amax(1, keepdim=True)
    int4 = ((W.view(-1, 64) / scale * 7).round() / 7 * scale).view_as(W)
    error = {"int4": (int4 - W).norm() / W.norm()}
    for kind in ("nf4", "fp4"):
        _, layer = four_bit((512, 512), quant_type=kind)
        requantise(layer, W)
        error[kind] = (read_weight(layer) - W).norm() / W.norm()
    assert error["nf4"] < error["int4"] < error["fp4"]
    assert error["nf4"] == pytest.approx(0.092, abs=0.003)


# ---------------------------------------------------------------- the storage's answers


SHAPES = [(48, 64), (40, 24), (128, 352), (64, 160), (48, 32), (6, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_is_read_as_it_computes_whole_and_in_blocks(
    shape, quant_type, double, storage, monkeypatch
):
    dense, layer = four_bit(
        shape, quant_type=quant_type, compress_statistics=double, quant_storage=storage
    )
    W = read_weight(layer)
    assert matrix_shape(layer) == W.shape == shape
    state = layer.weight.quant_state
    assert torch.equal(W, bnb.functional.dequantize_4bit(layer.weight.data, state))
    assert (W - dense.weight).norm() < 0.14 * W.norm()
    x = torch.randn(3, shape[1])
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), x @ W.T + layer.bias)
    monkeypatch.setattr("lit_adapters.weights.quantised.BLOCK", 300)
    blocks = list(weight_blocks(layer))
    assert len(blocks) > 1 or shape == (6, 12)
    assert torch.equal(torch.cat(blocks), W)


def test_a_layer_that_bitsandbytes_misreads_is_named():
    with pytest.warns(UserWarning, match="48 inputs"):
        four_bit((8, 48))


def test_int8_is_read_before_and_after_the_first_forward(quantised):
    model = quantised(kind="int8")
    layer = model.model.layers[0].mlp.up_proj
    W = read_weight(layer)
    x = torch.randn(5, 32)
    y = layer.train()(x)  # on a processor, training multiplies in the input's own precision
    torch.testing.assert_close(y, x @ W.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(read_weight(layer), W)
    assert torch.equal(torch.cat(list(weight_blocks(layer))), W)
    assert (W - FAMILIES["llama"]().model.layers[0].mlp.up_proj.weight).norm() < 0.02 * W.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantising_what_is_held_changes_nothing_and_something_else_is_held(quantised, kind):
    model = quantised(kind=kind)
    layer = model.model.layers[0].mlp.up_proj
    dense = FAMILIES["llama"]().model.layers[0].mlp.up_proj.weight.detach()
    before = packed(model)
    requantise(layer, dense)
    same(before, packed(model))
    if kind == "nf4":
        assert layer.weight.quant_state.dtype == torch.float32  # what the backward pass reads
    requantise(layer, 0.5 * dense)
    assert (read_weight(layer) - 0.5 * dense).norm() < 0.1 * (0.5 * dense).norm()
    with pytest.raises(TypeError, match="quantization='nf4'"):
        requantise(nn.Linear(2, 2), torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(64, 160), (48, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_dense_matrix_is_rounded_as_a_layer_rounds_it(kind, double, shape, dtype):
    dense, layer = four_bit(shape, quant_type=kind, compress_statistics=double)
    layer.weight.quant_state.dtype = dtype
    W = torch.randn(shape)
    requantise(layer, W)
    assert layer.weight.quant_state.dtype == dtype
    assert rounding(layer) == {"kind": kind, "double_quant": double}
    assert torch.equal(rounded(W, rounding(layer)), read_weight(layer))


def test_layers_are_known_before_bitsandbytes_is_imported():
    code = (
        "import sys, torch; from lit_adapters import LoRA, attach\n"
        "import lit_adapters.weights as weights\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "weights.hush(); import bitsandbytes as bnb\n"
        "layer = bnb.nn.LinearNF4(8, 4)\n"
        "print(weights.is_plain(layer), weights.is_plain(torch.nn.Linear(1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert "kernels" not in done.stderr


# ---------------------------------------------------------------- adapters beside it


STARTS = [None, Gaussian(), PiSSA(), OLoRA(), MiLoRA()]
METHODS = {
    "lora": LoRA(rank=4, alpha=8),
    "dora": DoRA(rank=4, alpha=8),
    "dora-dropout": DoRA(rank=4, alpha=8, dropout=0.3),
    "rslora": LoRA(rank=4, rslora=True),
    "llama-adapter": LLaMAAdapter(prompt_length=3, top_layers=2),
    "prefix": PrefixTuning(length=3),
    "whole": LoRA(rank=4, modules_to_save=["lm_head", "norm"]),
    "tokens": LoRA(rank=4, new_tokens=[3, 9]),
    "head": LoRA(rank=4, targets=["lm_head", "embed_tokens", "q_proj"]),
}


@every_kind
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "llama-adapter", "whole", "tokens"])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_leaves_the_output_to_the_bit(quantised, kind, method, training):
    model = quantised(kind=kind).train(training)
    before = logits(model)
    attach(model, METHODS[method], seed=0)
    assert_base_again(logits(model), before, model)


@pytest.mark.parametrize("start", STARTS[1:], ids=lambda start: type(start).__name__)
@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_start_drifts_by_nothing_and_leaves_the_base(quantised, start, method, dtype):
    model = quantised(dtype=dtype)
    before, bytes_before = logits(model), packed(model)
    attach(model, method(rank=4, alpha=8))
    initialise(model, start, seed=0)
    assert torch.equal(logits(model), before)
    same(bytes_before, packed(model))


@every_kind
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_beside_the_same_numbers_held_densely(quantised, kind, method):
    model = quantised(kind=kind)
    dense = dense_copy(model)
    grads = []
    for one in (model, dense):
        attach(one, METHODS[method], seed=0)
        if "lora" in method or "dora" in method:
            initialise(one, PiSSA(niter=None), seed=0)
        shake(one, std=0.1).train()
        torch.manual_seed(0)  # dropout
        loss = one(**batch()).loss
        loss.backward()
        grads.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
        grads[-1]["loss"] = loss.detach()
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_families_with_biases_and_transposed_layers(quantised, family):
    model = quantised(family)
    dense = dense_copy(model, family)
    for one in (model, dense):
        attach(one, LoRA(rank=4, bias="adapter"), seed=0)
        initialise(one, OLoRA(), seed=0)
        shake(one, std=0.1)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    for one in (model, dense):
        one.train()(**batch()).loss.backward()
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name
            )


@every_kind
@pytest.mark.parametrize("method", ["lora", "dora", "prefix", "whole", "tokens"])
def test_training_with_evaluation_in_between_leaves_the_packed_bytes(quantised, kind, method):
    model = quantised(kind=kind)
    attach(model, METHODS[method], seed=0)
    before, plain = (
        packed(model),
        {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        logits(model.eval())
        model.generate(batch()["input_ids"][:1], max_new_tokens=2, do_sample=False)
        model.state_dict()
    assert losses[-1] < (0.99 if method == "prefix" else 0.9) * losses[0]
    same(before, packed(model))
    for name, parameter in model.named_parameters():
        if name in plain:
            assert torch.equal(parameter, plain[name]), name


def test_a_model_that_bitsandbytes_has_repacked_is_undone_and_said(folders):
    import transformers

    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    wide = llama(hidden_size=128, intermediate_size=128)  # multiples of 64: no remainders
    wide.save_pretrained(folders("llama") + "-wide")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders("llama") + "-wide", quantization_config=settings, dtype=torch.float32
    )
    layer = model.model.layers[0].mlp.up_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor has no bf16 instructions, so nothing is repacked")
    with torch.no_grad():
        model.eval()(**batch())
    assert layer.weight.quant_state.packing_format_for_cpu
    with pytest.warns(UserWarning, match="load it anew"):
        attach(model, LoRA(rank=2))
    assert not layer.weight.quant_state.packing_format_for_cpu
    logits(model)
    model.train()(**batch()).loss.backward()
    assert layer.adapter.lora_B.grad.any()


def test_copies_and_pickles_compute_the_same(quantised):
    model = quantised()
    attach(model, LoRA(rank=4), seed=0)
    shake(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(logits(torch.load(stream, weights_only=False)), logits(model))
    detach(twin)
    assert not torch.equal(logits(twin), logits(model))


def test_gradient_checkpointing_gives_the_same_gradients(quantised):
    grads = []
    for checkpointing in (False, True):
        model = quantised()
        attach(model, LoRA(rank=4), seed=0)
        shake(model).train()
        if checkpointing:
            recompute_activations(model)
        model(**batch()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- beside PEFT


@pytest.mark.parametrize("dora", [False, True])
def test_peft_computes_the_same_on_a_4_bit_base(quantised, tmp_path, dora):
    peft = pytest.importorskip("peft")
    model, theirs = quantised(), quantised()
    attach(model, (DoRA if dora else LoRA)(rank=4, alpha=8), seed=0)
    shake(model)
    save_adapter(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-5, atol=1e-5)
    for one in (model, wrapped):
        one.train()(**batch()).loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    others = [p.grad for n, p in wrapped.named_parameters() if p.requires_grad]
    assert len(ours) == len(others)
    sums = [sorted(g.double().sum().item() for g in grads) for grads in (ours.values(), others)]
    torch.testing.assert_close(torch.tensor(sums[0]), torch.tensor(sums[1]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- files, merging, fingerprints


@every_kind
def test_an_adapter_goes_from_quantised_to_dense_and_back(quantised, tmp_path, kind):
    model = quantised(kind=kind)
    attach(model, LoRA(rank=4, alpha=8), seed=0)
    initialise(model, PiSSA(), seed=0)
    shake(model)
    save_adapter(model, tmp_path / "one")
    dense = FAMILIES["llama"]()
    load_adapter(dense, tmp_path / "one")
    again = quantised(kind=kind)
    load_adapter(again, tmp_path / "one")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    save_adapter(dense, tmp_path / "two")
    load_adapter(quantised(kind=kind), tmp_path / "two")


def test_a_start_from_gradients_is_made_on_the_dense_base_and_loaded(quantised, tmp_path):
    dense = FAMILIES["llama"]()
    attach(dense, LoRA(rank=4), seed=0)
    initialise(dense, LoRAGA(), [batch()], seed=0)
    save_adapter(dense, tmp_path)
    model = quantised()
    before = logits(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert model.model.layers[0].mlp.up_proj.adapter.pinned


def test_merging_reloads_dense_and_adds_the_product_to_the_original_weight(quantised, tmp_path):
    model = quantised()
    attach(model, LoRA(rank=4, alpha=8), seed=0)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    dense = FAMILIES["llama"]()
    load_adapter(dense, tmp_path / "adapter")
    merge(dense)
    adapter = model.model.layers[1].mlp.down_proj.adapter
    expected = FAMILIES["llama"]().model.layers[1].mlp.down_proj.weight + 2.0 * adapter.product()
    torch.testing.assert_close(dense.model.layers[1].mlp.down_proj.weight, expected)
    assert all(is_plain(module) for module in dense.modules())


@every_kind
def test_merging_in_place_is_refused_and_changes_nothing(quantised, tmp_path, kind):
    model = quantised(kind=kind)
    attach(model, LoRA(rank=4, targets=["embed_tokens", "q_proj", "lm_head"]), seed=0)
    shake(model)
    before, bits = logits(model), packed(model)
    plain = [m.weight.clone() for m in (model.model.embed_tokens, model.lm_head)]
    for run in (merge, lambda m: export_merged(m, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"quantised.*without.*quantisation.*merge"):
            run(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(model.model.embed_tokens.weight, plain[0])
    assert torch.equal(model.lm_head.weight, plain[1])
    same(bits, packed(model))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="undo most of what was trained"):
        write_weight(model.model.layers[0].mlp.up_proj, torch.zeros(48, 32))


def test_a_base_is_recognised_quantised_or_not_and_another_is_not(quantised):
    dense = fingerprint(FAMILIES["llama"]())
    for kind in KINDS:
        ours = fingerprint(quantised(kind=kind))
        assert same_base(ours, dense)
        assert same_base(dense, ours)
        assert same_base(ours, fingerprint(quantised(dtype=torch.bfloat16)))
        assert not same_base(ours, fingerprint(FAMILIES["llama"](1)))
        assert not same_base(ours, fingerprint(quantised(seed=1)))
        assert not same_base(ours, fingerprint(llama()))
    # Two dense bases that differ in a matrix alone are told apart.
    other = FAMILIES["llama"]()
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    assert not same_base(dense, fingerprint(other))
    assert same_base(fingerprint(quantised("gpt2")), fingerprint(FAMILIES["gpt2"]()))


def test_an_adapter_of_another_base_is_refused(quantised, tmp_path):
    model = quantised()
    attach(model, LoRA(rank=4), seed=0)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(FAMILIES["llama"](1), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(quantised(seed=1), tmp_path)


# ---------------------------------------------------------------- the module under a trainer


def rows(count):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (9,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


class Batches:
    """Whole batches, which Lightning takes as they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def fit(module, folder, precision="32-true", steps=4, callbacks=(), **more):
    seed_everything(1, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision=precision,
        callbacks=list(callbacks),
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    data = Batches([collate(rows(4), PAD)] * 8)
    trainer.fit(module, data, data, **more)
    return trainer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "quantization",
    ["nf4", "int8", BitsAndBytes(storage="float32"), BitsAndBytes(storage="bfloat16")],
    ids=str,
)
def test_precision_plugins_leave_packed_weights_and_masters(
    folders, tmp_path, precision, quantization
):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module = AdapterFineTuneModule(
        base=folders("llama"), adapter=LoRA(rank=4), quantization=quantization
    )
    fit(module, tmp_path, precision)
    fresh = load_base(folders("llama"), dtype, quantization=quantization)
    same(packed(fresh), packed(module.model))
    layer = module.model.model.layers[0].mlp.up_proj
    assert layer.adapter.lora_A.dtype == torch.float32
    assert layer.adapter.lora_B.any()
    assert layer.weight.dtype == fresh.model.layers[0].mlp.up_proj.weight.dtype
    assert module.model.model.norm.weight.dtype == dtype
    if quantization != "int8":
        wanted = torch.float32 if precision == "32-true" else torch.bfloat16
        assert layer.compute_dtype == wanted


@every_kind
def test_checkpoints_hold_the_adapter_alone_and_resume(folders, tmp_path, kind):
    def made():
        return AdapterFineTuneModule(
            base=folders("llama"), adapter=LoRA(rank=4), quantization=kind, warmup=0,
            lr_scheduler="constant",
        )  # fmt: skip

    trainer = fit(made(), tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    kept = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert kept["state_dict"]
    assert all(".adapter." in key for key in kept["state_dict"])
    assert kept["hyper_parameters"]["quantization"]["init_args"]["kind"] == kind
    resumed, straight = made(), made()
    fit(resumed, tmp_path, steps=4, ckpt_path=tmp_path / "two.ckpt")
    fit(straight, tmp_path, steps=4)
    theirs = dict(straight.named_parameters())
    for name, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, theirs[name])


def test_a_trained_bias_of_an_int8_layer_is_kept_and_its_scales_are_not(quantised):
    model = quantised("qwen2", kind="int8")
    logits(model)
    model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    for parameter in model.parameters():
        if parameter is not model.model.layers[0].self_attn.q_proj.bias:
            parameter.requires_grad_(False)
    assert any(key.endswith("SCB") for key in model.state_dict())
    assert set(keep_trained(model, model.state_dict())) == {"model.layers.0.self_attn.q_proj.bias"}


def test_saved_settings_come_back_and_nothing_else_does():
    module = AdapterFineTuneModule(quantization=BitsAndBytes("fp4", storage="bfloat16"))
    saved = json.loads(json.dumps(dict(module.hparams)))
    trusted = trusted_settings(saved)["quantization"]
    assert AdapterFineTuneModule(quantization=trusted).quantization == module.quantization
    assert AdapterFineTuneModule(quantization="nf4").quantization == BitsAndBytes("nf4")
    evil = {"quantization": {"class_path": "os.system", "init_args": {"kind": "nf4"}}}
    assert trusted_settings(evil)["quantization"]["class_path"] == "lit_adapters.BitsAndBytes"
    with pytest.raises(ValueError, match="do not fit"):
        trusted_settings({"quantization": {"init_args": {"command": "x"}}})


def test_head_embeddings_and_skipped_layers_keep_their_precision(quantised):
    model = quantised(kind=BitsAndBytes(skip=["down_proj"]))
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if not is_plain(m)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32


def test_settings_reach_the_layers(quantised):
    model = quantised(kind=BitsAndBytes("fp4", double_quant=False, compute_dtype="bfloat16"))
    layer = model.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("fp4", False, torch.bfloat16)
    assert quantised().model.layers[0].mlp.up_proj.weight.quant_state.nested


# ---------------------------------------------------------------- what is refused, in words


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(
        "lit_adapters.quantization.find_spec",
        lambda name: None if name == "bitsandbytes" else importlib.util.find_spec(name),
    )
    with pytest.raises(
        RuntimeError, match=r"needs bitsandbytes: pip install 'lit_adapters\[quant\]'"
    ):
        load_base("tiny", quantization="nf4")


def test_bf16_on_a_device_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")
    with pytest.raises(RuntimeError, match=r"Old Card has no bf16.*16-mixed"):
        load_base("tiny", torch.bfloat16, quantization="nf4", device=torch.device("cuda", 0))


@pytest.mark.parametrize("settings", [{"kind": "nf5"}, {"storage": "int3"}])
def test_a_name_that_is_none_is_refused(settings):
    with pytest.raises(ValueError, match="must be one of"):
        BitsAndBytes(**settings)


def test_what_needs_plain_weights_is_refused(quantised):
    model = quantised(kind=BitsAndBytes(storage="bfloat16"))
    with pytest.raises(ValueError, match="quantised and cannot be trained itself"):
        attach(model, FullFineTuning())
    with pytest.raises(ValueError, match="up_proj"):
        attach(model, LoRA(targets=["q_proj"], modules_to_save=["up_proj"]))
    with pytest.raises(ValueError, match="mlp"):
        attach(model, LoRA(targets=["q_proj"], modules_to_save=["mlp"]))
    attach(model, LoRA(rank=2))
    with pytest.raises(TypeError, match="without quantisation"):
        initialise(model, LoRAGA(), [batch()])


def test_loss_falls_on_the_embedded_base():
    model = load_base("tiny", quantization="nf4")
    attach(model, LoRA(rank=8), seed=0)
    ids = torch.arange(10, 42).view(2, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    dense = footprint(load_base("tiny").requires_grad_(False))
    assert footprint(model).base_bytes < 0.32 * dense.base_bytes
