"""Whole modules, biases and new tokens under the trainer and on the command line."""

import copy
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    InitAdapters,
    InstructionDataModule,
    LoRA,
    LoRAGA,
    PiSSA,
    load_adapter,
)
from lit_adapters.__main__ import main
from lit_adapters.base_model import load_base, load_tokenizer
from tests.data.word_tokenizer import word_tokenizer
from tests.models import gpt2, llama_tied, qwen2, shake
from tests.test_checkpoint import make_trainer, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
]

TOOL = ["<tool>", "</tool>"]
TINY_VOCAB, WORDS = 2048, 30  # rows of the embedded base, words of the tests' tokenizer


@dataclass
class Setup:
    """A base, an adapter with companions, and the last parts of what is trained beside it."""

    base: object
    spec: object
    beside: set[str]
    start: object = None
    settings: dict = field(default_factory=dict)

    def module(self):
        if self.base == "tiny":
            base, tokenizer = "tiny", None
        else:
            base, tokenizer = self.base(), word_tokenizer()
        return AdapterFineTuneModule(
            base,
            self.spec,
            tokenizer=tokenizer,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.1),
            lr_scheduler="constant",
            warmup=0.0,
            **self.settings,
        )

    def bare(self):
        return load_base("tiny") if self.base == "tiny" else self.base()

    def fit(self, folder, file, steps, *, resume=None, callbacks=(), **settings):
        seed_everything(0, verbose=False)
        module = self.module()
        callbacks = [AdapterCheckpoint(folder), *callbacks]
        if self.start is not None:
            callbacks.append(InitAdapters(self.start, batches=2))
        trainer = make_trainer(
            folder, *callbacks, max_steps=steps, max_epochs=9, limit_val_batches=0, **settings
        )
        data = InstructionDataModule(str(file), batch_size=4, val_size=4)
        trainer.fit(module, data, ckpt_path=resume)
        assert trainer.global_step == steps
        return module


SMALL = {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
HEAD = "lm_head.trained_copy.own.weight"
NORM = "model.norm.trained_copy.own.weight"
ROWS = "model.embed_tokens.new_rows.rows"
BIASES = {
    f"model.layers.{i}.self_attn.{n}_proj.trained_copy.own.bias" for i in (0, 1) for n in ("q", "v")
}
SETUPS = {
    "tiny-lora": Setup(
        "tiny", LoRA(**SMALL, modules_to_save=["model.norm"], new_tokens=TOOL), {NORM, ROWS}
    ),
    "tiny-dora": Setup(
        "tiny", DoRA(**SMALL, modules_to_save=["model.norm"], new_tokens=TOOL), {NORM, ROWS}
    ),
    "tiny-pissa": Setup(
        "tiny",
        LoRA(**SMALL, modules_to_save=["model.norm"], new_tokens=TOOL),
        {NORM, ROWS},
        PiSSA(niter=2),
    ),
    "tiny-plus": Setup(
        "tiny",
        LoRA(**SMALL, modules_to_save=["model.norm"], new_tokens=TOOL),
        {NORM, ROWS},
        settings={"lora_plus_ratio": 8.0, "embedding_lr": 1e-3, "gradient_checkpointing": True},
    ),
    "qwen2-lora-ga": Setup(
        qwen2,
        LoRA(**SMALL, modules_to_save=["model.norm"], bias="adapter", new_tokens=TOOL),
        {NORM, ROWS, "lm_head.new_rows.rows", *BIASES},
        LoRAGA(),
    ),
    "qwen2-whole": Setup(
        qwen2, LoRA(**SMALL, modules_to_save=["lm_head"], bias="all"),
        {HEAD, *BIASES, *(n.replace("q_proj", "k_proj") for n in BIASES)},
    ),
    "gpt2-all": Setup(
        gpt2,
        DoRA(rank=4, targets=["c_attn"], bias="all", new_tokens=TOOL, modules_to_save=["ln_f"]),
        {
            "transformer.wte.new_rows.rows",
            "transformer.ln_f.trained_copy.own.weight",
            "transformer.ln_f.trained_copy.own.bias",
            *(
                f"transformer.h.{i}.{n}.trained_copy.own.bias"
                for i in (0, 1)
                for n in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            ),
        },
        settings={"lora_plus_ratio": 4.0},
    ),
    "tied-bf16": Setup(
        llama_tied, LoRA(**SMALL, modules_to_save=["0.mlp"], new_tokens=TOOL),
        {ROWS, *(f"model.layers.0.mlp.{n}_proj.trained_copy.own.weight"
                 for n in ("gate", "up", "down"))},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Prompts and answers in which the new tokens occur."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {
            "prompt": f"{letters[i]} <tool> b",
            "completion": f"{' '.join(letters[: 1 + i % 5])} {end}",
        }
        for i, end in enumerate([TOOL[1]] * 24)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module", params=SETUPS)
def setup(request):
    return SETUPS[request.param]


@pytest.fixture(scope="module")
def settings(setup):
    return {"precision": "bf16-true"} if setup is SETUPS["tied-bf16"] else {}


class Seen(Callback):
    """The token ids of all training batches."""

    def __init__(self):
        self.ids = set()

    def on_train_batch_start(self, trainer, module, batch, index):
        self.ids |= set(batch["input_ids"].flatten().tolist())


@pytest.fixture(scope="module")
def fitted(setup, settings, pairs, tmp_path_factory):
    """A module after three steps, its folder, and the tokens that it saw."""
    folder, seen = tmp_path_factory.mktemp("fit"), Seen()
    return setup.fit(folder, pairs, 3, callbacks=[seen], **settings), folder, seen.ids


@torch.no_grad()
def scores(model, ids):
    return model.eval()(input_ids=ids).logits.float()


def some_ids(module):
    return module.tokenizer("a <tool> b c </tool>", return_tensors="pt")["input_ids"]


def test_the_data_hold_the_new_tokens(setup, fitted):
    module, _, seen = fitted
    if setup.spec.new_tokens is None:
        return
    ids = module.tokenizer.convert_tokens_to_ids(TOOL)
    first = TINY_VOCAB if setup.base == "tiny" else WORDS
    assert ids == [first, first + 1]
    assert set(ids) <= seen


def test_a_checkpoint_holds_exactly_what_is_trained(setup, fitted):
    module, folder, _ = fitted
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    beside = {n.removeprefix("model.") for n in trained if ".adapter." not in n}
    assert beside == setup.beside
    state = read(folder / "last.ckpt")["state_dict"]
    origin = {k for k in state if k.endswith(("lora_A0", "lora_B0"))}
    assert bool(origin) == (setup.start is not None)
    assert state.keys() - origin == trained
    stock = setup.bare().state_dict()
    assert not {f"model.{name}" for name in stock} & state.keys()
    for key, value in state.items():
        assert torch.equal(value, module.state_dict()[key])
        assert value.dtype == torch.float32


def test_training_moved_every_companion_and_no_weight_of_the_base(setup, fitted):
    module, folder, _ = fitted
    fresh, now, bare = setup.module(), dict(module.named_parameters()), setup.bare()
    fresh.configure_model()
    start = dict(fresh.named_parameters())
    for name in setup.beside:
        assert not torch.equal(now[f"model.{name}"], start[f"model.{name}"]), name
    for name, weight in bare.named_parameters():
        found = module.model.get_parameter(name)[: len(weight)]
        assert torch.equal(found, weight.to(found.dtype)), name


def test_a_resumed_run_is_an_unbroken_run_to_the_bit(setup, settings, fitted, pairs, tmp_path):
    module, folder, _ = fitted
    whole = setup.fit(tmp_path / "whole", pairs, 6, **settings)
    second = setup.fit(tmp_path / "second", pairs, 6, resume=folder / "last.ckpt", **settings)
    expected, found = whole.state_dict(), second.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name in setup.beside:
        assert not torch.equal(expected[f"model.{name}"], module.state_dict()[f"model.{name}"])


def test_the_folder_computes_the_same_on_a_fresh_base(setup, fitted):
    module, folder, _ = fitted
    loaded, tokenizer = setup.bare(), None
    if setup.spec.new_tokens:
        tokenizer = load_tokenizer("tiny") if setup.base == "tiny" else word_tokenizer()
    for parameter in loaded.parameters():  # as bf16-true does; rotary frequencies stay fp32
        parameter.data = parameter.data.to(module.model.dtype)
    load_adapter(loaded, folder / "adapter", tokenizer=tokenizer)
    ids = some_ids(module)
    expected = scores(copy.deepcopy(module.model), ids)
    assert torch.equal(scores(loaded, ids), expected)
    rows = loaded.get_input_embeddings().num_embeddings
    assert rows == loaded.config.vocab_size == expected.shape[-1]


def test_the_groups_of_lora_plus_hold_companions(pairs, tmp_path):
    """Vectors learn as fast as lora_B; rows of the embedding have the embedding's rate."""
    rates = {}

    class Look(Callback):
        def on_train_end(self, trainer, module):
            names = {id(p): n for n, p in module.model.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    rates[names[id(parameter)]] = (group["lr"], group["weight_decay"])

    SETUPS["tiny-plus"].fit(tmp_path, pairs, 1, callbacks=[Look()])
    found = {name.rpartition(".")[2]: rate for name, rate in rates.items() if "adapter" in name}
    assert found["lora_A"] == pytest.approx((5e-3, 0.1))
    assert found["lora_B"] == pytest.approx((4e-2, 0.1))
    assert rates[ROWS] == pytest.approx((1e-3, 0.1))
    assert rates[NORM] == pytest.approx((4e-2, 0.0))


def test_data_with_a_tokenizer_of_its_own_know_the_new_tokens(pairs, tmp_path):
    """Else the rows would stay as they are, and nobody would be told."""
    setup, seen = SETUPS["qwen2-lora-ga"], Seen()
    data = InstructionDataModule(str(pairs), tokenizer=word_tokenizer(), batch_size=4, val_size=4)
    trainer = make_trainer(tmp_path, seen, max_steps=5, limit_val_batches=0)
    try:
        trainer.fit(setup.module(), data)
    except ValueError as error:
        said = str(error)
    else:
        said = None
    assert {WORDS, WORDS + 1} <= seen.ids or "new_tokens" in str(said)


def test_a_checkpoint_without_the_companions_is_refused(fitted, setup, pairs, tmp_path):
    module, folder, _ = fitted
    state = torch.load(folder / "last.ckpt", weights_only=True)
    lost = f"model.{sorted(setup.beside)[0]}"
    del state["state_dict"][lost]
    torch.save(state, tmp_path / "lost.ckpt")
    with pytest.raises(ValueError, match="the checkpoint lacks") as caught:
        setup.fit(tmp_path, pairs, 4, resume=tmp_path / "lost.ckpt")
    assert lost in str(caught.value)


def test_gradients_of_companions_reach_every_part(pairs, tmp_path):
    module = SETUPS["gpt2-all"].fit(tmp_path, pairs, 1)
    shake(module.model)
    ids = some_ids(module)
    module.model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- the command line


def run(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *map(str, words)])
        main()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, pairs):
    """A `fit` of a small YAML that names all three fields, and its adapter folder."""
    root = tmp_path_factory.mktemp("chain")
    config = {
        "seed_everything": 1,
        "trainer": {"max_steps": 3, "default_root_dir": str(root), "limit_val_batches": 1,
                    "log_every_n_steps": 1},
        "model": {
            "base": "tiny",
            "adapter": {
                "class_path": "lit_adapters.LoRA",
                "init_args": {
                    "rank": 2,
                    "targets": ["q_proj"],
                    "modules_to_save": ["model.norm", "0.mlp"],
                    "bias": "none",
                    "new_tokens": TOOL,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"path": str(pairs), "batch_size": 4, "val_size": 4},
        "samples": {"limit": 1, "max_new_tokens": 2},
    }  # fmt: skip
    file = root / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    run("fit", "--config", file)
    (folder,) = root.glob("lightning_logs/version_0/checkpoints/adapter")
    return file, folder


@pytest.fixture(scope="module")
def adapted(chain):
    """The model of the chain's folder, and its tokenizer."""
    model, tokenizer = load_base("tiny"), load_tokenizer("tiny")
    load_adapter(model, chain[1], tokenizer=tokenizer)
    return model, tokenizer


def test_fit_of_a_yaml_writes_all_that_is_trained(chain):
    _, folder = chain
    config = json.loads((folder / "adapter_config.json").read_text())
    layer = "model.layers.0.mlp"
    assert sorted(config["modules_to_save"]) == [layer, "model.norm"]
    assert config["trainable_token_indices"] == {"model.embed_tokens": [TINY_VOCAB, TINY_VOCAB + 1]}
    last = read(folder.parent / "last.ckpt")
    beside = {key for key in last["state_dict"] if ".adapter." not in key}
    names = ("gate", "up", "down")
    assert beside == {
        *(f"model.{layer}.{name}_proj.trained_copy.own.weight" for name in names),
        f"model.{NORM}",
        f"model.{ROWS}",
    }


def test_fit_goes_on_and_validates_from_its_checkpoint(chain, tmp_path):
    file, folder = chain
    last = folder.parent / "last.ckpt"
    place = f"--trainer.default_root_dir={tmp_path}"
    run("fit", "--config", file, place, "--trainer.max_steps=4", f"--ckpt_path={last}")
    (again,) = tmp_path.glob("lightning_logs/version_0/checkpoints/last.ckpt")
    assert read(again)["global_step"] == 4
    assert read(again)["state_dict"].keys() == read(last)["state_dict"].keys()
    run("validate", "--config", file, place, f"--ckpt_path={last}")


def test_generate_speaks_new_tokens(chain, adapted, capsys, tmp_path):
    """With a row that makes the first new token the likeliest answer."""
    from safetensors.torch import load_file, save_file

    _, folder = chain
    model, tokenizer = adapted
    with torch.no_grad():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("a b", add_special_tokens=False)["input_ids"]]])  # fmt: skip  # noqa: E501
        hidden = model.eval().model(input_ids=ids).last_hidden_state[0, -1]
    tensors = load_file(folder / "adapter_model.safetensors")
    (key,) = [k for k in tensors if k.endswith("trainable_tokens_delta")]
    tensors[key][0] = 10 * hidden
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    run("generate", "--adapter", tmp_path, "--prompt", "a b", "--raw=true", "--max_new_tokens=2")
    assert capsys.readouterr().out.startswith("<tool>")


def test_merge_writes_a_stock_model_with_its_tokenizer(chain, adapted, tmp_path):
    model, tokenizer = adapted
    run("merge", "--adapter", chain[1], "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == merged.lm_head.out_features == TINY_VOCAB + 2
    assert words.convert_tokens_to_ids(TOOL) == [TINY_VOCAB, TINY_VOCAB + 1]
    ids = tokenizer("a <tool> b c </tool>", return_tensors="pt")["input_ids"]
    assert torch.equal(words("a <tool> b c </tool>", return_tensors="pt")["input_ids"], ids)
    assert (scores(merged, ids) - scores(model, ids)).abs().max() < 1e-4
    stock = {type(m) for m in load_base("tiny").modules()}
    assert {type(m) for m in merged.modules()} == stock
    run("generate", "--base", tmp_path / "merged", "--prompt", "a", "--max_new_tokens=1")


def test_export_writes_what_peft_loads_and_says_what_vllm_refuses(chain, adapted, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model, tokenizer = adapted
    capsys.readouterr()
    run("export", "--adapter", chain[1], "--output", tmp_path / "peft")
    said = " ".join(capsys.readouterr().out.split())
    assert "modules_to_save" in said
    assert "new tokens" in said
    base = load_base("tiny")
    words = AutoTokenizer.from_pretrained(tmp_path / "peft")
    base.resize_token_embeddings(len(words), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    ids = tokenizer("a <tool> b c </tool>", return_tensors="pt")["input_ids"]
    assert (scores(theirs, ids) - scores(model, ids)).abs().max() < 1e-4
    run("export", "--adapter", chain[1], "--output", tmp_path / "hf", "--format=hf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (scores(stock, ids) - scores(model, ids)).abs().max() < 1e-4


def test_the_base_given_as_a_folder_with_biases(pairs, tmp_path):
    """`bias: all` from the command line, on a base that has some."""
    base = tmp_path / "base"
    qwen2().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    file = tmp_path / "small.yaml"
    adapter = {"rank": 2, "targets": ["v_proj"], "bias": "all", "modules_to_save": ["lm_head"]}
    file.write_text(
        yaml.safe_dump(
            {
                "trainer": {"max_steps": 2, "default_root_dir": str(tmp_path / "runs"),
                            "limit_val_batches": 1, "log_every_n_steps": 1},
                "model": {
                    "base": str(base),
                    "adapter": {"class_path": "lit_adapters.LoRA", "init_args": adapter},
                },
                "data": {"path": str(pairs), "batch_size": 4, "val_size": 4},
                "samples": {"limit": 0},
            }
        )
    )  # fmt: skip
    run("fit", "--config", file)
    (folder,) = tmp_path.glob("runs/lightning_logs/version_0/checkpoints/adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    assert config["modules_to_save"] == ["lm_head"]
    run("merge", "--adapter", folder, "--base", base, "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(base)
    moved = {
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(value, stock.state_dict()[name])
    }
    biases = {name for name in stock.state_dict() if name.endswith("bias")}
    weights = {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}
    assert moved == {"lm_head.weight", *biases, *weights}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("modules_to_save=lm_head", "modules_to_save"),
        ("bias=lora_only", "bias"),
        ("new_tokens=[-1]", "new_tokens"),
        ("bias=all", "nothing in the model has a bias"),
    ],
)
def test_settings_that_are_wrong_are_said_on_the_command_line(flag, said, chain, tmp_path, capsys):
    words = ["fit", "--config", chain[0], f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(*words, f"--model.adapter.init_args.{flag}")
    told = f"{caught.value} {capsys.readouterr().err}"
    assert said in told
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_module_passed_in_keeps_its_vocabulary_after_detaching(pairs, tmp_path):
    from lit_adapters import detach

    base = load_base("tiny")
    stock = {name: value.clone() for name, value in base.state_dict().items()}
    module = AdapterFineTuneModule(
        base, LoRA(**SMALL, new_tokens=TOOL), tokenizer=load_tokenizer("tiny")
    )
    data = InstructionDataModule(str(pairs), batch_size=4, val_size=4)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data)
    assert base.config.vocab_size == TINY_VOCAB + 2
    detach(base)
    assert base.config.vocab_size == TINY_VOCAB
    assert isinstance(base.lm_head, nn.Linear)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert all(torch.equal(value, stock[name]) for name, value in base.state_dict().items())
    assert Path(tmp_path).exists()
