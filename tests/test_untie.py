"""Tied weights of which one end is adapted: refused in words, or untied on request."""

import copy
import json
import re
import signal
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_adapters import (
    DoRA,
    LLaMAAdapter,
    LoRA,
    PiSSA,
    attach,
    export_merged,
    export_peft,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.__main__ import console, main
from lit_adapters.attachment import adapted_layers
from lit_adapters.base_model import load_base
from lit_adapters.export import serving_notes
from lit_adapters.io import peft_config
from tests.models import (
    batch,
    fingerprint,
    gemma,
    gpt2,
    llama,
    llama_tied,
    logits,
    shake,
    snapshot,
)
from tests.reference import close

BUILDS = {"llama": llama_tied, "gpt2": gpt2, "gemma": gemma}
ENDS = {
    "llama": ("lm_head", "model.embed_tokens"),
    "gpt2": ("lm_head", "transformer.wte"),
    "gemma": ("lm_head", "model.embed_tokens"),
}
INNER = {"llama": ["q_proj"], "gpt2": ["c_attn"], "gemma": ["q_proj"]}


def spec(family, end):
    """Settings that adapt one end of the tie, or both, each by an adapter of its own."""
    head, embedding = ENDS[family]
    inner = INNER[family]
    return {
        "head": LoRA(rank=3, targets=[*inner, head]),
        "head-dora": DoRA(rank=3, targets=[*inner, head]),
        "embedding": LoRA(rank=3, targets=[*inner, embedding]),
        "both": LoRA(rank=3, targets=[head, embedding], rank_pattern={"lm_head": 2}),
        "whole-head": LoRA(rank=3, targets=inner, modules_to_save=["lm_head"]),
        "whole-embedding": LoRA(rank=3, targets=inner, modules_to_save=[embedding]),
        "whole-both": LoRA(rank=3, targets=inner, modules_to_save=[head, embedding]),
        "rows-and-head": LoRA(rank=3, targets=[head], new_tokens=[5, 71]),
    }[end]


ADAPTED = ["head", "head-dora", "embedding", "both", "whole-head", "whole-embedding", "whole-both",
           "rows-and-head"]  # fmt: skip
every_family = pytest.mark.parametrize("family", BUILDS)
every_end = pytest.mark.parametrize("end", ADAPTED)


def adapted(family, end, start=None):
    model = BUILDS[family]()
    attach(model, spec(family, end), seed=0)
    if start:
        initialise(model, start)
    return shake(model)


def ends(model, family):
    return tuple(model.get_submodule(name).weight for name in ENDS[family])


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------- refused


@every_end
@every_family
def test_without_untying_the_error_names_both_layers_and_the_remedy(family, end, tmp_path):
    model = adapted(family, end)
    before, config, expected = snapshot(model), model.config.to_dict(), logits(model)
    for call in (merge, partial(export_merged, path=tmp_path / "merged")):
        with pytest.raises(ValueError, match="tied to.*merging would change both") as caught:
            call(model)
        for words in (*map(repr, ENDS[family]), "untie=True", "--untie"):
            assert words in str(caught.value)
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), expected)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- untied


@every_end
@every_family
def test_an_untied_merge_computes_the_same(family, end):
    model = adapted(family, end)
    expected = logits(model)
    assert merge(model, untie=True) is model
    head, embedding = ends(model, family)
    assert head is not embedding
    assert head.data_ptr() != embedding.data_ptr()
    size = expected.abs().max()
    close(logits(model) / size, expected / size)
    assert not list(adapted_layers(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.config.tie_word_embeddings
    assert list(model.state_dict()) == list(BUILDS[family]().state_dict())
    model.tie_weights()  # what transformers may call again
    close(logits(model) / size, expected / size)


@pytest.mark.parametrize("end", ["head", "embedding", "whole-head", "whole-embedding"])
@every_family
def test_the_end_without_an_adapter_keeps_its_weight_to_the_bit(family, end):
    model = merge(adapted(family, end), untie=True)
    head, embedding = ends(model, family)
    stock = ends(BUILDS[family](), family)[0]
    kept, changed = (embedding, head) if "head" in end else (head, embedding)
    assert torch.equal(kept, stock)
    assert not torch.equal(changed, stock)


@every_end
@every_family
def test_an_exported_folder_is_a_stock_untied_model(family, end, tmp_path):
    model = adapted(family, end)
    before, config, expected = snapshot(model), model.config.to_dict(), logits(model)
    folder = export_merged(model, tmp_path, untie=True)
    assert snapshot(model) == before  # it keeps its adapters, and its tie
    assert model.config.to_dict() == config
    assert config_of(folder)["tie_word_embeddings"] is False
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not stock.config.tie_word_embeddings
    head, embedding = ends(stock, family)
    assert head is not embedding
    size = expected.abs().max()
    close(logits(stock) / size, expected / size)
    merged = merge(copy.deepcopy(model), untie=True)
    assert torch.equal(logits(stock), logits(merged))


def test_an_export_in_bf16_is_untied_too(tmp_path):
    model = adapted("llama", "both")
    folder = export_merged(model, tmp_path, dtype=torch.bfloat16, untie=True)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    head, embedding = ends(stock, "llama")
    assert not torch.equal(head, embedding)
    merged = merge(adapted("llama", "both"), untie=True)
    assert torch.equal(head, merged.lm_head.weight.to(torch.bfloat16))
    assert torch.equal(embedding, merged.model.embed_tokens.weight.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_in_another_dtype_is_rounded_once(tmp_path, dtype):
    model = llama().bfloat16()
    attach(model, LoRA(rank=2))
    shake(model)
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.double() + layer.adapter.scale * layer.adapter.product().double()
    stock = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path, dtype=dtype))
    found = stock.model.layers[0].mlp.up_proj.weight
    assert found.dtype == dtype
    close(found, exact.to(dtype), torch.finfo(dtype).eps)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("end", ["head", "embedding"])
def test_a_pinned_start_is_merged_into_an_untied_weight(end):
    model = adapted("llama", end, PiSSA())
    expected = logits(model)
    close(logits(merge(model, untie=True)), expected, 1e-4)


@every_family
def test_where_nothing_stands_in_the_way_nothing_is_untied(family, tmp_path):
    model = BUILDS[family]()
    attach(model, LoRA(rank=2, targets=INNER[family], new_tokens=[5, 71]))
    folder = export_merged(shake(model), tmp_path, untie=True)
    assert config_of(folder).get("tie_word_embeddings", True)
    merge(model, untie=True)
    head, embedding = ends(model, family)
    assert head is embedding
    assert model.config.tie_word_embeddings


def test_an_untied_model_is_merged_as_before():
    model = llama()
    attach(model, LoRA(rank=2, targets=["lm_head", "embed_tokens"]), seed=0)
    other = copy.deepcopy(shake(model))
    weights = [p.data_ptr() for p in (model.lm_head.weight, model.model.embed_tokens.weight)]
    merge(model, untie=True)
    assert snapshot(model)["state"] == snapshot(merge(other))["state"]
    assert weights == [
        p.data_ptr() for p in (model.lm_head.weight, model.model.embed_tokens.weight)
    ]


def test_what_cannot_be_merged_is_left_tied():
    model = llama_tied()
    attach(model, LLaMAAdapter(prompt_length=2, top_layers=1))
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(model, untie=True)
    assert snapshot(model) == before
    assert model.config.tie_word_embeddings


class Shared(nn.Module):
    """One weight in three layers of a model that is none of Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(5, 5) for _ in range(3))
        self.two.weight = self.three.weight = self.one.weight

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("targets", [["two"], ["one", "three"], ["one", "two", "three"]])
def test_a_weight_of_several_plain_layers(targets):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(3, 5)
    attach(model, LoRA(rank=2, targets=targets), seed=0)
    shake(model)
    before, expected = snapshot(model), model(x)
    with pytest.raises(ValueError, match="tied to") as caught:
        merge(model)
    named = [name for name in ("one", "two", "three") if repr(name) in str(caught.value)]
    assert named == ["one", "two", "three"]
    assert snapshot(model) == before
    stock = fingerprint(model.one.weight)
    close(merge(model, untie=True)(x), expected)
    left = {"one", "two", "three"} - set(targets)
    assert all(fingerprint(model.get_submodule(name).weight) == stock for name in left)
    assert len({id(p) for p in model.parameters()}) == 3 + len(targets) + bool(left)


def test_a_language_model_inside_another_module_is_stated_untied():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = llama_tied()

        def forward(self, **inputs):
            return self.lm(**inputs)

    model = Around()
    attach(model, LoRA(rank=2, targets=["lm.lm_head"]), seed=0)
    shake(model)
    expected = logits(model)
    merge(model, untie=True)
    close(logits(model), expected)
    assert not model.lm.config.tie_word_embeddings


def test_an_untied_model_trains_on():
    model = merge(adapted("llama", "head"), untie=True)
    attach(model, LoRA(rank=2, targets=["lm_head", "embed_tokens"]), seed=0)
    shake(model)
    expected = logits(model)
    model(**batch()).loss.backward()
    close(logits(merge(model)), expected, 1e-4)


# ---------------------------------------------------------------- the command line


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *map(str, arguments)])
        main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of the embedded base, which is tied, and the logits that they give."""
    made = {}
    for name, settings in {
        "head": {"targets": ["q_proj", "lm_head"]},
        "plain": {"targets": ["q_proj", "v_proj"], "rank": 16},
        "whole": {"targets": ["q_proj"], "modules_to_save": ["lm_head"], "rank": 32},
    }.items():
        model = load_base("tiny")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        attach(model, LoRA(**{"rank": 2, **settings}), seed=0)
        shake(model, std=0.02)
        made[name] = (save_adapter(model, tmp_path_factory.mktemp(name)), tiny_logits(model))
    return made


@torch.no_grad()
def tiny_logits(model):
    return model.eval()(torch.arange(5, 45).view(2, 20)).logits


@pytest.mark.parametrize("command", [["merge"], ["export", "--format=hf"]], ids=lambda c: c[0])
@pytest.mark.parametrize("name", ["head", "whole"])
def test_the_command_line_refuses_or_unties(command, name, folders, tmp_path, capsys):
    adapter, expected = folders[name]
    output = tmp_path / "merged"
    arguments = [*command, "--adapter", adapter, "--output", output]
    with pytest.raises(ValueError, match="'lm_head' is tied to 'model.embed_tokens'.*--untie"):
        run(*arguments)
    assert not output.exists()
    run(*arguments, "--untie")
    assert "merged" in capsys.readouterr().out
    assert config_of(output)["tie_word_embeddings"] is False
    stock = AutoModelForCausalLM.from_pretrained(output)
    size = expected.abs().max()
    close(tiny_logits(stock) / size, expected / size)


def test_the_command_line_says_it_in_one_line(folders, tmp_path, monkeypatch):
    arguments = ["merge", "--adapter", folders["head"][0], "--output", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["lit_adapters", *map(str, arguments)])
    monkeypatch.delenv("LIT_ADAPTERS_TRACEBACK", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="error: the weight of 'lm_head' is tied.*--untie"):
            console()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_where_nothing_is_tied_the_switch_does_nothing(folders, tmp_path):
    adapter, expected = folders["plain"]
    run("merge", "--adapter", adapter, "--output", tmp_path, "--untie")
    assert config_of(tmp_path)["tie_word_embeddings"] is True
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    close(tiny_logits(stock), expected, 1e-4)


def test_export_prints_what_servers_refuse(folders, tmp_path, capsys):
    run("export", "--adapter", folders["whole"][0], "--output", tmp_path / "whole")
    shown = " ".join(capsys.readouterr().out.split())
    assert "PEFT adapter written to" in shown
    assert "note: vLLM loads no whole modules (modules_to_save); export a merged model" in shown
    assert "--max-lora-rank 32" in shown
    model = load_base("tiny")
    load_adapter(model, tmp_path / "whole")
    close(tiny_logits(model), folders["whole"][1], 1e-6)
    run("export", "--adapter", folders["plain"][0], "--output", tmp_path / "plain")
    assert "note" not in capsys.readouterr().out


# ---------------------------------------------------------------- what serving systems accept


NOTES = {
    "rank-16": (LoRA(rank=16), []),
    "rank-16-pattern": (LoRA(rank=4, rank_pattern={"q_proj": 16}), []),
    "rslora": (LoRA(rank=2, rslora=True, dropout=0.1), []),
    "rank-17": (LoRA(rank=17), ["vLLM takes ranks up to 16.*--max-lora-rank 17"]),
    "rank-pattern": (LoRA(rank=2, rank_pattern={"q_proj": 20}), ["--max-lora-rank 20"]),
    "whole": (LoRA(rank=2, modules_to_save=["lm_head"]), ["whole modules.*--format hf"]),
    "biases": (LoRA(rank=2, bias="all"), ["trained biases.*--format hf"]),
    "biases-adapter": (LoRA(rank=2, bias="adapter"), ["trained biases.*--format hf"]),
    "rows": (LoRA(rank=2, new_tokens=[5]), ["new tokens.*--format hf.*PEFT.*tokenizer.*resize"]),
    "dora": (DoRA(rank=2), ["DoRA.*--format hf"]),
    "all": (
        DoRA(rank=32, bias="all", modules_to_save=["ln_f"], new_tokens=[5]),
        ["whole modules", "new tokens", "biases", "DoRA", "--max-lora-rank 32"],
    ),
}


@pytest.mark.parametrize(("settings", "expected"), NOTES.values(), ids=NOTES)
def test_notes_say_what_servers_refuse_and_nothing_else(settings, expected, tmp_path):
    model = llama() if "q_proj" in settings.rank_pattern else gpt2()
    attach(model, settings)
    notes = serving_notes(peft_config(model))
    assert len(notes) == len(expected)
    for said in expected:
        assert sum(bool(re.search(said, note)) for note in notes) == 1
    folder = export_peft(model, tmp_path)
    assert serving_notes(json.loads((folder / "adapter_config.json").read_text())) == notes


def test_a_pinned_start_counts_as_the_rank_that_is_written():
    model = llama()
    attach(model, LoRA(rank=12))
    assert serving_notes(peft_config(model)) == []
    initialise(model, PiSSA())
    [note] = serving_notes(peft_config(model))
    assert "--max-lora-rank 24" in note


@pytest.mark.parametrize("config", [{}, {"r": None, "bias": None, "rank_pattern": None}])
def test_notes_of_a_bare_config_are_none(config):
    assert serving_notes(config) == []
