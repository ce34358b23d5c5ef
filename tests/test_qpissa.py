"""QPiSSA and LoftQ: how a weight is split between a quantised base and an adapter, and kept."""

import gc
import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

from lightning.pytorch import LightningModule, Trainer

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    AdapterSet,
    BitsAndBytes,
    DoRA,
    InitAdapters,
    Kaiming,
    LoftQ,
    LoRA,
    PiSSA,
    PrefixTuning,
    QPiSSA,
    attach,
    export_peft,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.base_model import load_base
from lit_adapters.data import collate
from lit_adapters.dense_weights import DenseWeights
from lit_adapters.weights import is_plain, read_weight, rounded
from tests.models import batch, gpt2, llama, logits, shake
from tests.test_quantised import Batches, fit, packed, rows, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
FAMILIES = {"llama": partial(llama, intermediate_size=96), "gpt2": partial(gpt2, n_inner=96)}
SPEC = LoRA(rank=4, alpha=8)
NF4 = {"kind": "nf4", "double_quant": True}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for family, build in FAMILIES.items():
        for seed in (0, 1):
            build(seed).save_pretrained(root / f"{family}-{seed}", max_shard_size="20KB")
    return root


@pytest.fixture
def quantised(folders):
    def load(family="llama", seed=0, kind="nf4", **more):
        return load_base(str(folders / f"{family}-{seed}"), quantization=kind, **more)

    return load


@pytest.fixture
def started(quantised):
    def make(start=None, spec=SPEC, **more):
        model = quantised(**more)
        attach(model, spec)
        initialise(model, start or QPiSSA(iterations=3), seed=0)
        return model

    return make


def dense_matrix(family, name, seed=0):
    layer = FAMILIES[family](seed).get_submodule(name)
    return read_weight(layer).clone()


def svd(M, r):
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def nuclear(M):
    return torch.linalg.matrix_norm(M, "nuc").item()


# ---------------------------------------------------------------- the two loops


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_qpissa_is_the_papers_loop_and_ends_with_quantising(quantised, family, iterations):
    name = {"llama": LAYER, "gpt2": "transformer.h.1.attn.c_attn"}[family]
    model = quantised(family)
    attach(model, SPEC)
    initialise(model, QPiSSA(iterations, niter=None), seed=0)
    W = dense_matrix(family, name)
    Q = torch.zeros_like(W)
    for _ in range(iterations):
        low = svd(W - Q, 4)
        Q = rounded(W - low, NF4)
    layer = model.get_submodule(name)
    s, A, B = layer.adapter.scale, layer.adapter.lora_A, layer.adapter.lora_B
    torch.testing.assert_close(s * B @ A, low, rtol=1e-4, atol=1e-5)
    assert (read_weight(layer) - Q).norm() < 1e-3 * Q.norm()  # a few numbers are near a boundary
    assert torch.equal(read_weight(layer), rounded(W - s * (B @ A), NF4))
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq_is_the_other_order_and_ends_with_the_factors(quantised, iterations):
    model = quantised()
    plain = packed(model)
    attach(model, SPEC)
    initialise(model, LoftQ(iterations, niter=None), seed=0)
    W = dense_matrix("llama", LAYER)
    low = torch.zeros_like(W)
    for _ in range(iterations):
        Q = rounded(W - low, NF4)
        low = svd(W - Q, 4)
    layer = model.get_submodule(LAYER)
    adapter = layer.adapter
    torch.testing.assert_close(2.0 * adapter.product(), low, rtol=1e-3, atol=1e-4)
    assert (read_weight(layer) - Q).norm() < 1e-3 * Q.norm()
    if iterations == 1:
        same(plain, packed(model))


def reduction(weights, rank, start, rounds):
    """Share of the nuclear norm of NF4's error that a start takes away, mean over matrices."""
    from lit_adapters.initialisers import named_generator

    shares = []
    for name, W in weights.items():
        store = partial(rounded, how=NF4)
        split = start(rounds).split(W, rank, 1.0, generator=named_generator(name, 0), store=store)
        Q = rounded(W - split.taken.B @ split.taken.A, NF4)
        left = nuclear(W - Q - split.start.B @ split.start.A)
        shares.append(1 - left / nuclear(W - rounded(W, NF4)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("base", ["tiny", str(STORIES)], ids=["tiny", "stories260k"])
def test_on_trained_weights_more_rounds_help_and_loftq_helps_less(base):
    if not (base == "tiny" or STORIES.is_dir()):
        pytest.skip("needs the stories260k model")
    model = load_base(base)
    weights = {
        name: read_weight(layer)
        for name, layer in list(model.named_modules())
        if isinstance(layer, nn.Linear) and ".layers.1." in name
    }
    one, five = (reduction(weights, 16, QPiSSA, n) for n in (1, 5))
    loftq = reduction(weights, 16, LoftQ, 5)
    assert one > 0.1
    assert five > one + 0.02
    assert five > loftq + 0.01


def test_the_benchmark_prints_its_table_beside_the_papers_numbers(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "quantisation_error.py"), "--ranks", "4"]
    more = ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run([*script, *more], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said, _, head, _, ours, *papers = done.stdout.strip().splitlines()
    assert said.startswith("CPU, ")
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4
    assert head.count("|") == ours.count("|") == papers[0].count("|")
    assert ours.startswith("| tiny, r 4 | 0% | ")
    assert [row.split("|")[1].strip() for row in papers] == [
        "LLaMA-2-7B (paper)", "LLaMA-3-8B (paper)", "LLaMA-3-70B (paper)"
    ]  # fmt: skip


# ---------------------------------------------------------------- what computes


@pytest.mark.parametrize("spec", [SPEC, DoRA(rank=4, alpha=8)], ids=["lora", "dora"])
@pytest.mark.parametrize("start", [QPiSSA(3), LoftQ(2)], ids=["qpissa", "loftq"])
def test_the_start_computes_base_plus_product_and_is_nearer_to_the_original(
    started, quantised, spec, start
):
    model = started(start, spec)
    dense = FAMILIES["llama"]()
    for name, layer in model.named_modules():
        if not is_plain(layer):
            W = read_weight(layer) + layer.adapter.scale * layer.adapter.product()
            dense.get_submodule(name).weight.data.copy_(W)
            if isinstance(spec, DoRA):
                torch.testing.assert_close(layer.adapter.magnitude.detach(), W.norm(dim=1))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    exact = logits(FAMILIES["llama"]())
    plain = (logits(quantised()) - exact).norm()
    assert (logits(model) - exact).norm() < 0.9 * plain


def test_only_the_factors_are_trained_and_the_written_base_stays(started):
    model = started()
    before = packed(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith(("lora_A", "lora_B")) for n in trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    taken = model.get_submodule(LAYER).adapter.taken_A.clone()
    for _ in range(5):
        model.train()(**batch()).loss.backward()
        optimizer.step()
        logits(model.eval())
    same(before, packed(model))
    assert torch.equal(model.get_submodule(LAYER).adapter.taken_A, taken)


def test_plain_pissa_leaves_the_base_and_starts_exactly_where_it_is(quantised):
    model = quantised()
    before, bits = logits(model), packed(model)
    attach(model, SPEC)
    initialise(model, PiSSA(), seed=0)
    assert torch.equal(logits(model), before)
    same(bits, packed(model))


def test_int8_and_other_storage_are_split_as_well(started, quantised):
    for kind in ("int8", BitsAndBytes(storage="bfloat16"), BitsAndBytes(double_quant=False)):
        model = started(QPiSSA(2), kind=kind)
        layer, W = model.get_submodule(LAYER), dense_matrix("llama", LAYER)
        error = W - read_weight(layer) - layer.adapter.scale * layer.adapter.product()
        assert nuclear(error) < nuclear(W - read_weight(quantised(kind=kind).get_submodule(LAYER)))


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("spec", [SPEC, DoRA(rank=4, alpha=8)], ids=["lora", "dora"])
@pytest.mark.parametrize("start", [QPiSSA(3), LoftQ(2)], ids=["qpissa", "loftq"])
def test_a_folder_makes_the_same_base_again_to_the_bit(started, quantised, tmp_path, spec, start):
    model = shake(started(start, spec), std=0.05)
    save_adapter(model, tmp_path / "one")
    again = quantised()
    load_adapter(again, tmp_path / "one")
    same(packed(model), packed(again))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    load_adapter(again, tmp_path / "one")  # once more, over itself
    same(packed(model), packed(again))
    save_adapter(again, tmp_path / "two")
    for file in ("adapter_model.safetensors", "adapter_config.json", "lit_adapters.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    notes = json.loads((tmp_path / "one" / "lit_adapters.json").read_text())
    assert notes["quantised_as"] == NF4
    assert notes["initialiser"] == repr(start)


@pytest.mark.parametrize("spec", [SPEC, DoRA(rank=4, alpha=8)], ids=["lora", "dora"])
def test_on_the_dense_base_it_computes_the_same_and_merges(started, tmp_path, spec):
    model = shake(started(spec=spec), std=0.05)
    save_adapter(model, tmp_path / "one")
    dense = FAMILIES["llama"]()
    load_adapter(dense, tmp_path / "one")
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    save_adapter(dense, tmp_path / "two")
    one, two = ((tmp_path / n / "lit_adapters.json").read_text() for n in ("one", "two"))
    assert json.loads(one)["base_fingerprint"] == json.loads(two)["base_fingerprint"]
    with pytest.raises(ValueError, match="load it anew"):
        load_adapter(dense, tmp_path / "one")
    merge(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="original base"):  # it was written
        load_adapter(dense, tmp_path / "one")


def test_any_other_base_is_refused_and_left_alone(started, quantised, tmp_path):
    save_adapter(started(), tmp_path / "one")
    for other in (FAMILIES["llama"](1), quantised(seed=1)):
        before = logits(other)
        with pytest.raises(ValueError, match="another base"):
            load_adapter(other, tmp_path / "one")
        with pytest.raises(ValueError, match="original base"):
            load_adapter(other, tmp_path / "one", check_base=False)
        assert torch.equal(logits(other), before)
    nearly = FAMILIES["llama"]()  # another in one matrix alone
    nearly.get_submodule(LAYER).weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="original base"):
        load_adapter(nearly, tmp_path / "one")
    fp4 = quantised(kind="fp4")
    with pytest.raises(ValueError, match=r"quantised as .*nf4.*quantised as .*fp4"):
        load_adapter(fp4, tmp_path / "one")
    moved = quantised()
    moved.config._name_or_path = "nowhere-to-be-found"
    with pytest.raises(ValueError, match="unquantised weights are needed"):
        load_adapter(moved, tmp_path / "one")
    original = FAMILIES["llama"]()
    weights = {n: m.weight for n, m in original.named_modules() if isinstance(m, nn.Linear)}
    load_adapter(moved, tmp_path / "one", weights=weights)


def test_peft_and_adapter_sets_refuse_it(started, quantised, tmp_path):
    model = started()
    save_adapter(model, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["peft_type"] == (
        "LIT_LORA"
    )
    with pytest.raises(ValueError, match="PEFT has nothing"):
        export_peft(model, tmp_path / "two")
    with pytest.raises(ValueError, match="base of its own"):
        AdapterSet(model)
    adapters = AdapterSet(quantised())
    with pytest.raises(ValueError, match="base of its own"):
        adapters.load("q", tmp_path / "one")


# ---------------------------------------------------------------- what is refused


def test_a_base_that_is_not_quantised_and_methods_without_factors_are_refused(quantised):
    dense = FAMILIES["llama"]()
    attach(dense, SPEC)
    with pytest.raises(TypeError, match="is not; set quantization: nf4"):
        initialise(dense, QPiSSA())
    prompts = quantised()
    attach(prompts, PrefixTuning(length=2))
    with pytest.raises(TypeError, match="no low-rank factors"):
        initialise(prompts, QPiSSA())
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        QPiSSA(iterations=0)


def test_a_failure_on_the_way_leaves_base_and_adapters_as_they_were(quantised):
    model = quantised()
    attach(model, SPEC, seed=0)
    bits, before = packed(model), logits(model)
    weights = DenseWeights(model)
    seen = []

    class Failing:
        def __getitem__(self, name):
            if len(seen) == 3:
                seen.append(name)
                raise OSError("disk gone")
            seen.append(name)
            return weights[name]

    with pytest.raises(OSError, match="disk gone"):
        initialise(model, QPiSSA(2), weights=Failing())
    same(bits, packed(model))
    assert torch.equal(logits(model), before)


def test_another_start_on_a_written_base_is_refused(started):
    model = started()
    with pytest.raises(ValueError, match="load the base anew"):
        initialise(model, Kaiming())


def test_one_dense_matrix_at_a_time(quantised):
    model = quantised()
    attach(model, SPEC)
    dense = DenseWeights(model)
    alive = weakref.WeakSet()

    class Watched:
        def __getitem__(self, name):
            gc.collect()
            assert not alive
            matrix = dense[name]
            alive.add(matrix.untyped_storage())
            return matrix

    initialise(model, QPiSSA(2), weights=Watched())


# ---------------------------------------------------------------- under a trainer


def made(folders):
    return AdapterFineTuneModule(
        base=str(folders / "llama-0"), adapter=SPEC, quantization="nf4", warmup=0,
        lr_scheduler="constant",
    )  # fmt: skip


def fitted(folders, tmp_path, steps, **more):
    module = made(folders)
    start = InitAdapters(QPiSSA(2))
    trainer = fit(module, tmp_path, steps=steps, callbacks=[start], **more)
    return module, trainer


def test_a_run_resumes_to_the_bit_and_evaluates_from_its_checkpoint(folders, tmp_path):
    straight, trainer = fitted(folders, tmp_path, 4)
    _, short = fitted(folders, tmp_path, 2)
    short.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fitted(folders, tmp_path, 4, ckpt_path=tmp_path / "two.ckpt")
    same(packed(straight.model), packed(resumed.model))
    theirs = dict(straight.named_parameters())
    for name, parameter in resumed.named_parameters():
        if ".adapter." in name:
            torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-7)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    bare = made(folders)  # InitAdapters starts nothing: the checkpoint says what was taken
    evaluated = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[InitAdapters()]
    )
    data = Batches([collate(rows(4), 0)])
    evaluated.validate(bare, data, ckpt_path=tmp_path / "four.ckpt", verbose=False)
    same(packed(straight.model), packed(bare.model))
    assert torch.equal(logits(bare.model.eval()), logits(straight.model.eval()))
    save_adapter(bare.model, tmp_path / "folder")
    again = load_base(str(folders / "llama-0"), quantization="nf4")
    load_adapter(again, tmp_path / "folder")
    assert torch.equal(logits(again), logits(straight.model))


class Foreign(LightningModule):
    """Someone's own module, around a model that was quantised and adapted in ``__init__``."""

    def __init__(self, folder):
        super().__init__()
        self.net = load_base(str(folder), quantization="nf4")
        attach(self.net, SPEC, seed=0)
        self.net.train()
        self.strict_loading = False

    def training_step(self, data, index):
        return self.net(**data).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("visible", [True, False])
def test_a_foreign_module_resumes_on_the_same_base(folders, tmp_path, visible):
    def run(steps, ckpt_path=None):
        module = Foreign(folders / "llama-0")
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=steps,
            enable_model_summary=False, callbacks=[InitAdapters(QPiSSA(2)), AdapterCheckpoint()],
            default_root_dir=tmp_path / f"{steps}-{ckpt_path is None}",
        )  # fmt: skip
        trainer.ckpt_path = ckpt_path if visible else None
        data = Batches([batch()] * 4)
        trainer.fit(module, data, ckpt_path=None if visible else ckpt_path)
        return module, trainer

    straight, _ = run(4)
    _, short = run(2)
    resumed, _ = run(4, short.checkpoint_callback.last_model_path)
    same(packed(straight), packed(resumed))
    assert torch.equal(logits(straight.net.eval()), logits(resumed.net.eval()))
    save_adapter(resumed.net, tmp_path / "folder")
    again = load_base(str(folders / "llama-0"), quantization="nf4")
    load_adapter(again, tmp_path / "folder")
    assert torch.equal(logits(again), logits(resumed.net))
