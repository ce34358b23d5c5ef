"""Compiled layers: the same numbers under the same names, and few compilations."""

import shutil
from itertools import chain

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch._dynamo.utils import counters

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    LLaMAAdapter,
    LoRA,
    PiSSA,
    PrefixTuning,
    attach,
    initialise,
)
from lit_adapters.compilation import backend_of, compile_layers
from lit_adapters.data import collate
from lit_adapters.recompute import recompute_activations
from tests.data.word_tokenizer import word_tokenizer
from tests.models import PAD, VOCAB, batch, gemma, gpt2, llama, shake, trainable
from tests.test_module import Batches, examples, fit, make, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # Of torch's own, while it looks at what a layer is called with.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def graphs():
    """Graphs that were compiled so far."""
    return counters["stats"]["unique_graphs"]


def of_lengths(lengths, rows=2, padded=False, seed=0):
    """One batch for each length; padded ones have a mask that hides something."""
    generator = torch.Generator().manual_seed(seed)

    def one(length, row):
        ids = torch.randint(3, VOCAB, (length - (row if padded else 0),), generator=generator)
        return {"input_ids": ids.tolist(), "labels": ids.tolist()}

    return Batches(collate([one(length, r) for r in range(rows)], PAD) for length in lengths)


# --- the same numbers ----------------------------------------------------------------------------

METHODS = {
    "lora": LoRA(rank=4),
    "lora-dropout": LoRA(rank=4, dropout=0.3),
    "dora": DoRA(rank=4),
    "dora-dropout": DoRA(rank=4, dropout=0.3),
    "pissa": LoRA(rank=4),
    "second-layer-alone": LoRA(rank=4, layers=[1]),
    "prefix": PrefixTuning(length=3),
    "llama-adapter": LLaMAAdapter(prompt_length=3, top_layers=1),
}


def gradients(model):
    torch.manual_seed(3)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def adapted(make_base, method):
    model = make_base()
    attach(model, METHODS[method])
    if method == "pissa":
        initialise(model, PiSSA())
    return shake(model).train()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_plain_model(method, recomputed):
    """Dropout as well, which draws the same once where layers are recomputed."""
    model = adapted(llama, method)
    if recomputed:
        recompute_activations(model)
    plain = gradients(model)
    compile_layers(model, "aot_eager")
    close(gradients(model), plain)
    assert 0 < graphs() <= 4


@pytest.mark.parametrize("make_base", [gpt2, gemma])
def test_other_families(make_base):
    model = adapted(make_base, "lora")
    plain = gradients(model)
    compile_layers(model, "aot_eager")
    close(gradients(model), plain)
    assert graphs() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_loss_and_gradients_of_torchs_default_backend():
    model = adapted(llama, "lora")
    recompute_activations(model)
    plain = gradients(model)
    compile_layers(model, backend_of(True))
    close(gradients(model), plain)
    assert graphs() > 0


# --- in a fit ------------------------------------------------------------------------------------


def test_equal_shapes_are_compiled_once(tmp_path):
    """Once for the first layer, whose input asks for no gradient, and once for the others."""
    settings = {"max_epochs": -1}
    fit(tmp_path, make(compile="eager"), of_lengths([12] * 4), max_steps=1, **settings)
    first = graphs()
    torch.compiler.reset()
    counters.clear()
    fit(tmp_path, make(compile="eager"), of_lengths([12] * 4), max_steps=8, **settings)
    assert first == graphs() == 2


def test_many_lengths_are_no_storm(tmp_path):
    """Masked or not, in training and validation; twice as many lengths compile nothing more."""
    seen = []
    for count in (6, 12):
        torch.compiler.reset()
        counters.clear()
        lengths = range(10, 10 + count)
        train = chain(*zip(of_lengths(lengths), of_lengths(lengths, padded=True), strict=True))
        fit(
            tmp_path,
            make(compile="eager"),
            Batches(train),
            of_lengths(range(10, 14), padded=True),
            val_check_interval=6,
        )
        seen.append(graphs())
    assert seen[0] == seen[1] <= 10


@pytest.mark.parametrize("packed", [False, True])
def test_a_fit_is_that_of_the_plain_model(tmp_path, packed):
    rows = examples(32)
    train = Batches(collate(rows[i : i + 4], PAD, packed=packed) for i in range(0, 32, 4))
    trained = {}
    for backend in (False, "eager"):
        module = make(compile=backend)
        torch.manual_seed(0)
        fit(tmp_path, module, train)
        assert module.packing_obstacle is None
        trained[backend] = trainable(module.model)
    assert 0 < graphs() <= 16
    for name, tensor in trained[False].items():
        torch.testing.assert_close(trained["eager"][name], tensor, rtol=1e-3, atol=1e-5)
    assert trained[False].keys() == trained["eager"].keys()


def test_checkpoints_have_the_names_of_the_plain_model(tmp_path):
    held = {}
    for backend in (False, "eager"):
        folder = tmp_path / str(backend)
        keep = AdapterCheckpoint(folder, monitor=None)
        options = {"callbacks": [keep], "enable_checkpointing": True}
        fit(folder, make(compile=backend), of_lengths([9, 9]), **options)
        held[backend] = torch.load(folder / "last.ckpt", weights_only=True)
    assert graphs() > 0
    assert held[False]["state_dict"].keys() == held["eager"]["state_dict"].keys()
    assert held["eager"]["hyper_parameters"]["compile"] == "eager"
    assert (tmp_path / "eager" / "adapter" / "adapter_config.json").exists()
    # One goes on with the other.
    trainer = make_trainer(
        tmp_path,
        callbacks=[AdapterCheckpoint(tmp_path / "new", monitor=None)],
        enable_checkpointing=True,
    )
    trainer.fit(make(), of_lengths([9, 9]), ckpt_path=tmp_path / "eager" / "last.ckpt")
    assert trainer.global_step == 2


def test_answers_are_the_plain_models_and_compile_nothing(tmp_path):
    rows = [{"prompt": "a b c"}, {"prompt": "d"}]
    answers = {}
    for backend in (False, "eager"):
        module = make(compile=backend, tokenizer=word_tokenizer(), max_new_tokens=5)
        module.configure_model()
        shake(module.model)
        answers[backend] = module.predict_step(rows, 0)
    assert answers[False] == answers["eager"]
    assert graphs() == 0


# --- what is refused -----------------------------------------------------------------------------


def test_settings():
    assert (backend_of(True), backend_of(False), backend_of("eager")) == ("inductor", None, "eager")
    with pytest.raises(ValueError, match="compile='fast' is no backend of torch.compile; expected"):
        AdapterFineTuneModule("tiny", compile="fast")


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list of decoder layers"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)), "eager")


def test_fsdp1_is_refused():
    with pytest.raises(ValueError, match="compile with FSDPStrategy.*Take FSDP2"):
        compile_layers(llama(), "eager", FSDPStrategy())


def test_a_missing_compiler_is_said_before_the_first_step(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler on the CPU.*install one"):
        make(compile=True).configure_model()
