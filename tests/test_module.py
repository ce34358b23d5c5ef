"""The module under a real trainer: what it trains, what it logs, what it leaves alone."""

import copy
import csv
import json
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as CLIReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import lit_adapters.first_steps
from lit_adapters import AdapterCheckpoint, AdapterFineTuneModule, InitAdapters, LoRA, attach
from lit_adapters.data import collate
from lit_adapters.initialisers import Gaussian
from tests.data.word_tokenizer import word_tokenizer
from tests.models import PAD, VOCAB, base_bytes, gpt2, llama, logits, trainable

pytestmark = [
    # Lightning 2.6 on torch 2.13: any trainer with any data raises this.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Most fits here need no validation.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

PRECISIONS = ["32-true", "bf16-true", "bf16-mixed"]


class Batches:
    """Batches in the order given, in every epoch."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Memory(Logger):
    """Keeps what is logged: (step, values)."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def __getitem__(self, key):
        return [values[key] for _, values in self.rows if key in values]


def examples(count, seed=0):
    """Ragged sequences whose first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, VOCAB, (4 + (7 * number) % 11,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def in_batches(rows, size):
    return Batches(collate(rows[i : i + size], PAD) for i in range(0, len(rows), size))


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2)


def make(base=None, **settings):
    settings = {"adapter": LoRA(rank=4), "lr_scheduler": "constant", "warmup": 0.0, **settings}
    return AdapterFineTuneModule(llama() if base is None else base, **settings)


def make_trainer(folder, **settings):
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": Memory(),
            "log_every_n_steps": 1,
            "max_epochs": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **settings,
        }
    )


def fit(folder, module, train, validation=None, **settings):
    trainer = make_trainer(folder, **settings)
    trainer.fit(module, train, validation)
    return trainer


def sums(model, rows):
    """Summed NLL and trained tokens, one unpadded sequence at a time."""
    nll, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                nll -= scores[position, label].item()
                tokens += 1
    return nll, tokens


@pytest.fixture
def folder_of_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "model"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_fp32_adapters_are_trained(tmp_path, folder_of_base, precision, source):
    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.base = base_bytes(pl_module.model)
            self.adapter = trainable(pl_module.model)

    start = AtStart()
    module = make(folder_of_base if source == "folder" else llama(), optimizer=adamw)
    fit(
        tmp_path,
        module,
        in_batches(examples(20), 2),
        max_epochs=2,
        precision=precision,
        callbacks=[start],
    )
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert base_bytes(module.model) == start.base == base_bytes(llama().to(dtype))
    after = trainable(module.model)
    assert after.keys() == start.adapter.keys()
    assert len(after) == 2 * 14
    for name, value in after.items():
        assert ".adapter.lora_" in name
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert not torch.equal(value, start.adapter[name]), name
    # the low bits are in use: these are no rounded copies of bf16 weights
    assert any(not torch.equal(v, v.bfloat16().float()) for v in after.values())
    frequencies = module.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, llama().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_first_loss_is_that_of_the_base(tmp_path, folder_of_base, precision):
    batches = in_batches(examples(3), 3)
    trainer = fit(tmp_path, make(folder_of_base), batches, precision=precision)
    model = llama().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    if precision == "bf16-true":
        model.model.rotary_emb.inv_freq = llama().model.rotary_emb.inv_freq
    batch = batches.batches[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed"):
        scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(scores[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].ravel())
    assert trainer.logger["train/loss"] == pytest.approx([expected.item()], rel=1e-6)


def test_precision_does_not_change_the_start(tmp_path, folder_of_base):
    starts = []
    for precision in PRECISIONS:
        seed_everything(7, verbose=False)
        module = make(folder_of_base)
        make_trainer(tmp_path, precision=precision).validate(
            module, in_batches(examples(2), 2), verbose=False
        )
        starts.append(trainable(module.model))
    for other in starts[1:]:
        assert all(torch.equal(other[name], value) for name, value in starts[0].items())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_of_the_base_can_be_chosen(tmp_path, folder_of_base, dtype, expected):
    module = make(folder_of_base, dtype=dtype)
    fit(tmp_path, module, in_batches(examples(2), 2))
    kinds = {str(p.dtype) for p in module.model.parameters() if not p.requires_grad}
    assert kinds == {f"torch.{expected}"}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}


# --- dropout and modes ---------------------------------------------------------------------------


def test_dropout_of_adapter_and_base_runs_in_training_only(tmp_path):
    gpt2(resid_pdrop=0.3).save_pretrained(tmp_path / "base")
    rows = examples(4)
    evaluated = {}
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        weights = []
        for seed in (1, 2):
            torch.manual_seed(0)
            module = make(str(tmp_path / "base"), adapter=LoRA(rank=4, dropout=dropout))
            module.configure_model()
            if not dropout:
                for part in module.model.modules():
                    if isinstance(part, torch.nn.Dropout):
                        part.p = 0.0
            assert module.model.training
            torch.manual_seed(seed)
            trainer = fit(tmp_path, module, in_batches(rows, 2), in_batches(rows, 2), max_epochs=2)
            assert module.model.training
            weights.append(trainable(module.model))
            evaluated[name, seed] = trainer.logger["val/loss"]
        first, second = weights
        same = [torch.equal(first[key], second[key]) for key in first]
        assert not any(same) if dropout else all(same)
    assert evaluated["without", 1] == evaluated["without", 2]


def test_dropout_of_the_base_alone_changes_the_first_loss(tmp_path):
    gpt2(resid_pdrop=0.3).save_pretrained(tmp_path / "base")
    batches = in_batches(examples(4), 4)
    module = make(str(tmp_path / "base"))
    first = fit(tmp_path, module, batches).logger["train/loss"][0]
    nll, tokens = sums(gpt2(), examples(4))
    assert abs(first - nll / tokens) > 1e-3


# --- the loss over an accumulation window --------------------------------------------------------


class Gradients(Callback):
    """The gradients of the last step, by name; the module frees them after it."""

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note(pl_module.model))

    def note(self, model):
        self.last = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_no_gradient_outlives_its_step(tmp_path):
    class Held(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            held = [p.grad is not None for p in pl_module.model.parameters() if p.requires_grad]
            seen.append((all(held), any(held)))

    seen = []
    batches = in_batches(examples(16), 4)
    fit(tmp_path, make(), batches, accumulate_grad_batches=2, callbacks=[Held()])
    assert seen == [(True, True), (False, False)] * 2


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("count", [16, 10])  # 10: the last window of an epoch is incomplete
def test_accumulated_batches_train_like_one_batch(tmp_path, clip, count):
    """Lengths differ, so that averaging the micro-batches' means would be another number."""
    rows = examples(count)
    runs = []
    for size, accumulate in ((4, 1), (1, 4), (2, 2)):
        module, stepped = make(optimizer=sgd), Gradients()
        trainer = fit(
            tmp_path,
            module,
            in_batches(rows, size),
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=[stepped],
        )
        runs.append((trainer, trainable(module.model), stepped.last))
    whole, *others = runs
    steps = 2 * math.ceil(count / 4)
    assert len(whole[0].logger["train/loss"]) == whole[0].global_step == steps
    if clip:
        norms = torch.stack([g.norm() for g in whole[2].values()])
        assert norms.norm().item() == pytest.approx(clip, rel=1e-4)
        assert min(whole[0].logger["train/grad_norm"]) > clip
    for trainer, weights, gradients in others:
        for key in ("train/loss", "train/grad_norm"):
            assert trainer.logger[key] == pytest.approx(whole[0].logger[key], rel=2e-6, abs=1e-6)
        for name in weights:
            torch.testing.assert_close(weights[name], whole[1][name], rtol=0, atol=1e-6)
            torch.testing.assert_close(gradients[name], whole[2][name], rtol=0, atol=1e-6)


def test_logged_loss_and_gradient_are_the_mean_over_trained_tokens(tmp_path):
    rows = examples(4)
    module, stepped = make(optimizer=sgd), Gradients()
    trainer = fit(
        tmp_path, module, in_batches(rows, 1), accumulate_grad_batches=4, callbacks=[stepped]
    )
    nll, tokens = sums(llama(), rows)
    assert trainer.logger["train/loss"] == pytest.approx([nll / tokens], rel=1e-6)

    model = llama()
    attach(model, LoRA(rank=4))
    total = sum(
        F.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:]),
            reduction="sum",
        )
        for row in rows
    )
    (total / tokens).backward()
    norms = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(stepped.last[name], parameter.grad, rtol=1e-4, atol=1e-6)
            norms.append(parameter.grad.norm())
    norm = torch.stack(norms).norm().item()
    assert trainer.logger["train/grad_norm"] == pytest.approx([norm], rel=1e-4)


def test_nll_is_summed_over_the_trained_tokens():
    rows = examples(5)
    module = make()
    module.configure_model()
    module.model.eval()
    with torch.no_grad():
        nll, tokens = module.nll(collate(rows, PAD))
    expected, count = sums(llama(), rows)
    assert nll.item() == pytest.approx(expected, rel=1e-6)
    assert tokens.item() == count == sum(len(row["input_ids"]) - 2 for row in rows)


def test_a_fit_after_an_interrupted_one_starts_its_window_anew(tmp_path):
    class Failing(Callback):
        def on_after_backward(self, trainer, pl_module):
            raise MemoryError("too large")

    rows = examples(4)
    module, clean = make(optimizer=sgd), make(optimizer=sgd)
    with pytest.raises(MemoryError):
        fit(tmp_path, module, in_batches(rows, 4), callbacks=[Failing()])
    for parameter in module.model.parameters():
        parameter.grad = None
    again = fit(tmp_path, module, in_batches(rows, 4)).logger
    once = fit(tmp_path, clean, in_batches(rows, 4)).logger
    assert again["train/loss"] == once["train/loss"]
    assert again["train/grad_norm"] == once["train/grad_norm"]


def test_a_window_without_trained_tokens_stops_in_words_and_changes_nothing(tmp_path):
    rows = examples(2)
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    module = make(optimizer=sgd)
    module.configure_model()
    before = trainable(module.model)
    with pytest.raises(RuntimeError, match="no token of optimizer step 1 is trained"):
        fit(tmp_path, module, in_batches(rows, 1))
    assert all(torch.equal(before[name], value) for name, value in trainable(module.model).items())


# --- gradient checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_gradient_checkpointing_changes_memory_and_no_number(tmp_path, build, precision):
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = build(resid_pdrop=0.1) if build is gpt2 else build()
        calls = []
        first = base.get_submodule(
            "model.layers.0.mlp" if build is llama else "transformer.h.0.mlp"
        )
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        module = make(
            base,
            adapter=LoRA(rank=4, dropout=0.1),
            optimizer=sgd,
            gradient_checkpointing=checkpointing,
        )
        module.configure_model()
        calls.clear()
        torch.manual_seed(3)
        batches, stepped = in_batches(examples(8), 2), Gradients()
        trainer = fit(tmp_path, module, batches, precision=precision, callbacks=[stepped])
        assert len(calls) == 1 + 4 * (2 if checkpointing else 1)  # 1: the check that adapters fire
        runs.append((trainer.logger["train/loss"], stepped.last, trainable(module.model)))
    (losses, gradients, weights), other = runs
    assert other[0] == losses
    assert len(losses) == 4
    for name in weights:
        assert torch.equal(other[1][name], gradients[name]), name
        assert torch.equal(other[2][name], weights[name]), name


def test_gradient_checkpointing_leaves_evaluation_and_prediction_alone(tmp_path):
    tokenizer = word_tokenizer()
    found = []
    for checkpointing in (False, True):
        module = make(tokenizer=tokenizer, gradient_checkpointing=checkpointing, max_new_tokens=4)
        trainer = make_trainer(tmp_path)
        data = in_batches(examples(4), 2)
        found.append(
            (
                trainer.validate(module, data, verbose=False),
                trainer.predict(module, data),
            )
        )
    assert found[0] == found[1]


# --- where the base comes from -------------------------------------------------------------------


def test_base_as_folder_and_as_model_train_alike(tmp_path, folder_of_base):
    results = []
    for base in (folder_of_base, llama()):
        module = make(base, optimizer=sgd)
        trainer = fit(tmp_path, module, in_batches(examples(8), 2))
        results.append((trainer.logger["train/loss"], logits(module.model.eval())))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_checkpoints_with_base_as_folder_and_as_model_are_interchangeable(tmp_path, folder_of_base):
    """A model passed in is held once, under the same name as one that was loaded."""
    files = []
    for name, base in (("folder", folder_of_base), ("model", llama())):
        module = make(base)
        trainer = fit(tmp_path, module, in_batches(examples(4), 2))
        files.append(tmp_path / f"{name}.ckpt")
        trainer.save_checkpoint(files[-1])
    keys = [set(torch.load(file, weights_only=True)["state_dict"]) for file in files]
    assert keys[0] == keys[1]
    assert all(key.startswith("model.") for key in keys[0])
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(make(llama()), in_batches(examples(4), 2), ckpt_path=files[0])
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization": "nf4", "revision": "main"}, "quantization, revision would say"),
        ({"dtype": "bfloat16"}, "dtype would say"),
        ({"attn_implementation": "eager"}, "attn_implementation would say"),
    ],
)
def test_what_says_how_to_load_a_base_is_not_ignored_of_a_model(settings, named):
    with pytest.warns(UserWarning, match=named):
        make(llama(), **settings)


def test_a_checkpoint_that_names_its_data_type_loads_onto_a_model(folder_of_base, tmp_path):
    module = AdapterFineTuneModule(
        str(folder_of_base), tokenizer=word_tokenizer(), dtype="float32", adapter=LoRA(rank=3)
    )
    trainer = fit(tmp_path, module, in_batches(examples(4), 2))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    with pytest.warns(UserWarning, match="dtype would say"):
        loaded = AdapterFineTuneModule.load_from_checkpoint(
            tmp_path / "some.ckpt", base=llama(), tokenizer=word_tokenizer()
        )
    for name, value in trainable(module.model).items():
        assert torch.equal(trainable(loaded.model)[name], value)


def test_adapters_on_a_model_passed_in_are_trained_or_refused(tmp_path, caplog):
    """As where modules of a search share one model: no setting is ignored."""
    model, data = llama(), in_batches(examples(4), 2)
    fit(tmp_path, make(model, adapter=LoRA(rank=2), optimizer=adamw), data)
    trained = trainable(model)
    with pytest.raises(ValueError, match=r"holds adapters already.*rank=2.*rank=16.*detach"):
        fit(tmp_path, make(model, adapter=LoRA(rank=16)), data)
    assert all(torch.equal(trained[n], value) for n, value in trainable(model).items())
    assert not any("trained on" in record.getMessage() for record in caplog.records)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, make(model, adapter=LoRA(rank=2)), data)
    assert any("trained on" in record.getMessage() for record in caplog.records)
    module = make(model, adapter=None)
    assert module.hparams["adapter"]["init_args"]["rank"] == 2
    fit(tmp_path, module, data)


def test_new_tokens_on_a_model_passed_in_are_known_to_a_tokenizer_by_name(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "words")
    model = llama(vocab_size=len(tokenizer))
    attach(model, LoRA(rank=2, new_tokens=["<tool>"]), tokenizer=word_tokenizer())
    module = AdapterFineTuneModule(model, tokenizer=str(tmp_path / "words"))
    assert module.tokenizer.convert_tokens_to_ids("<tool>") == len(tokenizer)


def test_tokenizer_is_the_one_passed_or_that_of_the_base(folder_of_base):
    tokenizer = word_tokenizer()
    assert make(llama(), tokenizer=tokenizer).tokenizer is tokenizer
    tokenizer.save_pretrained(folder_of_base)
    assert make(folder_of_base).tokenizer.get_vocab() == tokenizer.get_vocab()
    assert make(llama(), tokenizer=folder_of_base).tokenizer.eos_token == "</s>"
    with pytest.raises(ValueError, match="pass tokenizer="):
        _ = make(llama()).tokenizer


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        make(str(tmp_path / "nowhere")).configure_model()


# --- what is logged ------------------------------------------------------------------------------


def test_every_documented_key_is_logged(tmp_path):
    module = make(optimizer=adamw)
    fit(
        tmp_path,
        module,
        in_batches(examples(8), 2),
        in_batches(examples(3, seed=1), 2),
        logger=CSVLogger(tmp_path, version=0),
        accumulate_grad_batches=2,
    )
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {}
    for row in rows:
        for key, value in row.items():
            if value:
                logged.setdefault(key, []).append(float(value))
    once = {
        "parameters/trainable",
        "parameters/trainable_share",
        "bytes/base",
        "bytes/adapter",
        "bytes/optimizer",
    }
    per_step = {
        "train/loss",
        "train/tokens_per_second",
        "train/grad_norm",
        "lr",
        "memory/peak_mb",
    }
    validation = {"val/loss", "val/perplexity", "val/token_accuracy"}
    assert once | per_step | validation <= set(logged)
    assert {key: len(logged[key]) for key in once | per_step | validation} == {
        **dict.fromkeys(once | validation, 1),
        **dict.fromkeys(per_step, 2),
    }
    trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.model.parameters() if not p.requires_grad)
    assert logged["parameters/trainable"] == [trained]
    assert logged["parameters/trainable_share"] == pytest.approx([trained / (trained + frozen)])
    assert logged["bytes/base"] == [4 * frozen]
    assert logged["bytes/adapter"] == [4 * trained]
    assert 8 * trained <= logged["bytes/optimizer"][0] <= 8 * trained + 1000  # two moments
    assert min(logged["train/tokens_per_second"]) > 0
    assert min(logged["memory/peak_mb"]) > 10


def test_perplexity_is_exp_of_summed_nll_over_summed_tokens(tmp_path):
    rows = examples(7)
    module = make()
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    nll, tokens = sums(copy.deepcopy(module.model).eval(), rows)
    for size in (1, 3, 7):
        trainer = make_trainer(tmp_path)
        found = trainer.validate(module, in_batches(rows, size), verbose=False)[0]
        assert found["val/loss"] == pytest.approx(nll / tokens, rel=1e-6)
        assert found["val/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        tested = trainer.test(module, in_batches(rows, size), verbose=False)[0]
        assert tested == {key.replace("val", "test"): value for key, value in found.items()}


def test_token_accuracy_counts_trained_tokens_only(tmp_path):
    rows = examples(6)
    module = make()
    right = total = 0
    for row in rows:
        best = llama()(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        for position in range(2, len(row["labels"]), 2):  # every second label is made right
            row["labels"][position] = best[position - 1]
        for position in range(2, len(row["labels"])):
            total += 1
            right += row["labels"][position] == best[position - 1]
    found = make_trainer(tmp_path).validate(module, in_batches(rows, 4), verbose=False)[0]
    assert found["val/token_accuracy"] == pytest.approx(right / total)
    assert 0.4 < right / total < 0.8


def test_sums_of_one_evaluation_do_not_reach_the_next(tmp_path):
    module = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    data = in_batches(examples(5), 2)
    trainer = fit(tmp_path, module, data, data, max_epochs=3)
    values = trainer.logger["val/loss"]
    assert len(values) == 3
    assert len(set(values)) == 1


# --- optimizer and schedule ----------------------------------------------------------------------


def expected_factor(decay, step, warm, total):
    if step < warm:
        return (step + 1) / (warm + 1)
    done = min(1.0, (step - warm) / (total - warm))
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
    }[decay]


@pytest.mark.parametrize("warmup", [0.0, 0.25, 3])
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_schedule_advances_once_per_optimizer_step(tmp_path, decay, warmup):
    module = make(lr_scheduler=decay, warmup=warmup, optimizer=adamw)
    trainer = fit(
        tmp_path, module, in_batches(examples(12), 1), max_epochs=2, accumulate_grad_batches=3
    )
    warm = warmup if warmup >= 1 else 8 * warmup
    expected = [1e-2 * expected_factor(decay, step, warm, 8) for step in range(8)]
    assert trainer.logger["lr"] == pytest.approx(expected)
    if warm:
        assert expected[0] < expected[1] < max(expected)
    final = trainer.optimizers[0].param_groups[0]["lr"]
    assert final == pytest.approx(1e-2 if decay == "constant" else 0.0)


@pytest.mark.parametrize(("warmup", "said"), [(4, True), (3, False), (0.9, False), (0, False)])
def test_a_warmup_as_long_as_the_run_is_said(tmp_path, caplog, warmup, said):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, make(warmup=warmup), in_batches(examples(4), 1))
    lines = [record.getMessage() for record in caplog.records]
    assert said == any("warm-up of 4 steps never ends: this run has 4" in line for line in lines)


def test_a_scheduler_class_works_and_has_no_warmup(tmp_path):
    module = make(
        optimizer=adamw,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1),
        warmup=0.5,
    )
    trainer = fit(tmp_path, module, in_batches(examples(8), 1), accumulate_grad_batches=2)
    assert trainer.logger["lr"] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss"])
def test_a_plateau_of_a_logged_value_lowers_the_rate(monitor, tmp_path):
    def schedule(optimizer):
        settings = {"patience": 1, "threshold": 1e9, "threshold_mode": "abs"}  # nothing is better
        if monitor == "val/loss":
            return ReduceLROnPlateau(optimizer, **settings)
        return CLIReduceLROnPlateau(optimizer, monitor, **settings)

    module, data = make(optimizer=adamw, lr_scheduler=schedule), in_batches(examples(4), 2)
    trainer = fit(tmp_path, module, data, data, max_epochs=6)
    assert trainer.logger["lr"] == pytest.approx([1e-2] * 6 + [1e-3] * 4 + [1e-4] * 2)


def test_schedule_follows_max_steps(tmp_path):
    module = make(optimizer=adamw, lr_scheduler="linear")
    trainer = fit(tmp_path, module, in_batches(examples(4), 1), max_epochs=-1, max_steps=10)
    assert trainer.logger["lr"] == pytest.approx([1e-2 * (1 - step / 10) for step in range(10)])


def test_a_run_without_end_is_refused_or_trained_at_a_constant_rate(tmp_path):
    """Only `max_time` or an early stop ends it, so there is no last step to decay towards."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    settings = {"max_epochs": -1, "max_time": {"minutes": 1}, "callbacks": [Stop()]}
    trainer = fit(tmp_path, make(optimizer=adamw), in_batches(examples(2), 1), **settings)
    assert trainer.logger["lr"] == pytest.approx([1e-2] * 3)
    with pytest.raises(ValueError, match="max_steps"):
        fit(tmp_path, make(lr_scheduler="cosine"), in_batches(examples(2), 1), **settings)


def test_vectors_take_no_weight_decay(tmp_path):
    module = make(
        llama(attention_bias=True),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    )
    module.configure_model()
    module.model.model.norm.weight.requires_grad_(True)
    module.model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    trainer = fit(tmp_path, module, in_batches(examples(2), 1))
    matrices, vectors = trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert [p.ndim for p in vectors["params"]] == [1, 1]
    assert len(matrices["params"]) == 28


@pytest.mark.parametrize(
    ("factory", "fused"),
    [
        (None, True),
        (adamw, True),
        (lambda groups: torch.optim.AdamW(groups, fused=False), False),
        (lambda groups: torch.optim.AdamW(groups, foreach=True), None),
        (torch.optim.Adagrad, True),
        (lambda groups: torch.optim.RMSprop(groups, lr=1e-3), "absent"),
    ],
    ids=["default", "adamw", "fused-false", "foreach", "adagrad", "rmsprop"],
)
def test_fused_kernel_is_on_unless_chosen_otherwise(tmp_path, factory, fused):
    trainer = fit(tmp_path, make(optimizer=factory), in_batches(examples(2), 1))
    assert trainer.optimizers[0].param_groups[0].get("fused", "absent") == fused
    assert trainer.global_step == 2


def test_default_optimizer_is_adamw_without_decay(tmp_path):
    trainer = fit(tmp_path, make(), in_batches(examples(1), 1))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-4, 0.0)


# --- hyper-parameters ----------------------------------------------------------------------------


def assert_plain(value):
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in (str, int, float, bool, type(None)), type(value)


def test_hyperparameters_are_plain_and_rebuild_the_trained_module(tmp_path, folder_of_base):
    spec = LoRA(rank=3, alpha=6, dropout=0.1, targets=["q_proj", "v_proj"], rank_pattern={"v": 2})
    module = make(folder_of_base, adapter=spec, optimizer=adamw, lr_scheduler="linear", warmup=2)
    trainer = fit(tmp_path, module, in_batches(examples(4), 1))
    file = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=True)["hyper_parameters"]
    assert_plain(json.loads(json.dumps(saved)))
    assert saved["adapter"]["init_args"]["rank_pattern"] == {"v": 2}
    loaded = AdapterFineTuneModule.load_from_checkpoint(file)
    assert loaded.adapter == spec
    assert (loaded.lr_scheduler, loaded.warmup, loaded.base) == ("linear", 2, folder_of_base)
    # Not to the bit: where memory begins, it may be summed in another order.
    torch.testing.assert_close(logits(loaded.model.eval()), logits(module.model.eval()))
    assert not torch.allclose(logits(loaded.model), logits(llama()), atol=1e-3)
    changed = AdapterFineTuneModule.load_from_checkpoint(file, warmup=5)
    assert changed.warmup == 5


def test_a_checkpoint_of_a_passed_model_loads_onto_a_model_that_is_passed(tmp_path):
    module = make(llama(), optimizer=adamw)
    trainer = fit(tmp_path, module, in_batches(examples(4), 1))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = AdapterFineTuneModule.load_from_checkpoint(tmp_path / "trained.ckpt", base=llama())
    assert torch.equal(logits(loaded.model.eval()), logits(module.model.eval()))


def test_a_callable_scheduler_does_not_spoil_the_checkpoint(tmp_path, folder_of_base):
    module = make(
        folder_of_base,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    )
    trainer = fit(tmp_path, module, in_batches(examples(2), 1))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = AdapterFineTuneModule.load_from_checkpoint(tmp_path / "trained.ckpt")
    again = fit(tmp_path, loaded, in_batches(examples(2), 1))
    assert again.global_step == 2


def test_an_unknown_method_in_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="'system' is unknown; expected one of"):
        AdapterFineTuneModule("tiny", adapter={"class_path": "os.system", "init_args": {}})


# --- the trainer's other entry points ------------------------------------------------------------


def test_adapters_are_checked_once_per_fit(tmp_path, monkeypatch):
    calls = []
    real = lit_adapters.first_steps.check_adapters_fire
    monkeypatch.setattr(
        lit_adapters.first_steps,
        "check_adapters_fire",
        lambda model, batch: (calls.append(1), real(model, batch)),
    )
    module = make()
    fit(tmp_path, module, in_batches(examples(6), 2), max_epochs=3)
    assert len(calls) == 1
    fit(tmp_path, module, in_batches(examples(2), 2))
    assert len(calls) == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bypassed_layer_is_an_error_before_the_first_step(tmp_path, precision):
    base = llama()
    mlp = base.model.layers[1].mlp
    mlp.forward = lambda x: F.linear(
        mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
    )
    module = make(base)
    trainer = make_trainer(tmp_path, precision=precision)
    with pytest.raises(
        RuntimeError, match=r"1 of 14 adapters never ran.*layers\.1\.mlp\.down_proj"
    ):
        trainer.fit(module, in_batches(examples(2), 2))
    assert trainer.global_step == 0


def test_the_check_does_not_shift_random_choices(tmp_path, monkeypatch):
    runs = []
    for check in (True, False):
        if not check:
            monkeypatch.setattr(lit_adapters.first_steps, "check_adapters_fire", lambda *_: None)
        torch.manual_seed(0)
        module = make(gpt2(resid_pdrop=0.2), adapter=LoRA(rank=4, dropout=0.2))
        module.configure_model()
        torch.manual_seed(5)
        runs.append(fit(tmp_path, module, in_batches(examples(4), 1)).logger["train/loss"])
    assert runs[0] == runs[1]


def test_validate_before_fit_and_fit_twice(tmp_path, folder_of_base):
    rows = examples(6)
    data = in_batches(rows, 3)
    module = make(folder_of_base, optimizer=adamw)
    before = make_trainer(tmp_path).validate(module, data, verbose=False)[0]["val/loss"]
    nll, tokens = sums(llama(), rows)
    assert before == pytest.approx(nll / tokens, rel=1e-6)
    model = module.model
    first = fit(tmp_path, module, data, data, max_epochs=2).logger["val/loss"]
    middle = trainable(module.model)
    second = fit(tmp_path, module, data, data, max_epochs=2).logger["val/loss"]
    assert module.model is model
    assert before > first[0] > first[1] > second[0] > second[1]
    assert all(not torch.equal(middle[n], value) for n, value in trainable(module.model).items())


def test_a_second_fit_does_not_restart_what_the_first_trained(tmp_path):
    """The same callback serves both fits: it has done its work in the first."""
    start = InitAdapters(Gaussian())
    module = make(optimizer=adamw)
    data = in_batches(examples(4), 2)
    first = fit(tmp_path, module, data, data, callbacks=[start]).logger["val/loss"]
    second = fit(tmp_path, module, data, data, callbacks=[start]).logger["train/loss"]
    assert second[0] < first[0] + 0.5
    assert start.initialised


def test_predict_answers_every_row(tmp_path):
    tokenizer = word_tokenizer()
    base = llama(vocab_size=len(tokenizer))
    rows = []
    for text, response in (("a b c", "d e"), ("k", "l m n"), ("x y", "z")):
        prompt = tokenizer(text)["input_ids"]
        answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    module = make(base, tokenizer=tokenizer, max_new_tokens=3)
    found = make_trainer(tmp_path).predict(module, in_batches(rows, 2))
    assert [len(batch) for batch in found] == [2, 1]
    flat = [row for batch in found for row in batch]
    assert [row["prompt"] for row in flat] == ["a b c", "k", "x y"]
    assert [row["reference"] for row in flat] == ["d e", "l m n", "z"]
    assert all(isinstance(row["prediction"], str) for row in flat)
    assert all(len(row["prediction"].split()) <= 3 for row in flat)


def test_a_stock_checkpoint_callback_writes_no_base_weight(tmp_path, folder_of_base):
    module = make(folder_of_base)
    for weights_only in (False, True):
        callback = ModelCheckpoint(tmp_path / str(weights_only), save_weights_only=weights_only)
        fit(
            tmp_path,
            module,
            in_batches(examples(2), 1),
            callbacks=[callback],
            enable_checkpointing=True,
        )
        state = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
        assert len(state) == 28
        assert all(".adapter.lora_" in key for key in state)


def test_gradient_clipping_by_value_acts_on_the_mean(tmp_path):
    stepped = Gradients()
    fit(
        tmp_path,
        make(optimizer=sgd),
        in_batches(examples(4), 1),
        accumulate_grad_batches=4,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm="value",
        callbacks=[stepped],
    )
    gradients = torch.cat([gradient.flatten() for gradient in stepped.last.values()])
    assert gradients.abs().max().item() == pytest.approx(1e-3)


def test_a_model_passed_in_gives_one_adapter_folder(tmp_path):
    callback = AdapterCheckpoint(tmp_path / "out")
    fit(
        tmp_path,
        make(llama()),
        in_batches(examples(2), 1),
        callbacks=[callback],
        enable_checkpointing=True,
    )
    names = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert "adapter_config.json" in names
    assert not any(path.is_dir() for path in (tmp_path / "out" / "adapter").iterdir())


# --- several sources -----------------------------------------------------------------------------


def test_evaluation_is_the_same_under_any_batching(tmp_path):
    rows, found = examples(11), []
    for size in (1, 3, 11):
        (metrics,) = make_trainer(tmp_path).validate(make(), in_batches(rows, size), verbose=False)
        found.append(metrics)
    nll, tokens = sums(llama(), rows)
    for metrics in found:
        assert metrics["val/loss"] == pytest.approx(nll / tokens, rel=1e-6)
        assert metrics["val/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
        assert metrics == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_several_sources_are_evaluated_together_and_apart(tmp_path, stage):
    rows = {"short": examples(3), "long": [row for row in examples(9) if len(row["labels"]) > 8]}
    loaders = {source: in_batches(own, 2) for source, own in rows.items()}
    trainer = make_trainer(tmp_path)
    run = {"val": trainer.validate, "test": trainer.test}[stage]
    found = run(make(), loaders, verbose=False)[0]
    parts = {source: sums(llama(), own) for source, own in rows.items()}
    nll, tokens = (sum(part[i] for part in parts.values()) for i in (0, 1))
    assert found[f"{stage}/loss"] == pytest.approx(nll / tokens, rel=1e-6)
    for source, (nll, tokens) in parts.items():
        assert found[f"{stage}/loss/{source}"] == pytest.approx(nll / tokens, rel=1e-6)
        assert found[f"{stage}/perplexity/{source}"] == pytest.approx(math.exp(nll / tokens))
        assert 0 <= found[f"{stage}/token_accuracy/{source}"] <= 1
    assert len(found) == 9


def test_several_sources_are_evaluated_while_training(tmp_path):
    loaders = {"a": in_batches(examples(3), 2), "b": in_batches(examples(5), 2)}
    logged = fit(tmp_path, make(), in_batches(examples(4), 2), loaders).logger
    assert len(logged["val/loss"]) == len(logged["val/loss/a"]) == len(logged["val/loss/b"]) == 1
    assert logged["val/loss/a"] != logged["val/loss/b"]


def test_loaders_without_names_and_a_single_one_are_evaluated_together(tmp_path):
    rows = examples(5)
    for loaders in (
        [in_batches(rows[:2], 1), in_batches(rows[2:], 2)],
        {"only": in_batches(rows, 2)},
    ):
        found = make_trainer(tmp_path).validate(make(), loaders, verbose=False)[0]
        nll, tokens = sums(llama(), rows)
        assert found["val/loss"] == pytest.approx(nll / tokens, rel=1e-6)
        assert len(found) == 3
