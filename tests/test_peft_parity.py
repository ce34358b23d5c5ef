"""HF PEFT as an oracle: the same numbers in memory, and files that travel both ways."""

import json
import warnings
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_adapters import LoRA, attach, detach, load_adapter, merge, save_adapter
from tests.models import BUILDERS, base_bytes, batch, gpt2, llama, logits, shake, trainable

peft = pytest.importorskip("peft")
from peft.utils import get_peft_model_state_dict  # noqa: E402

HIDDEN = 32
ATTENTION = {"gpt2": ["c_attn"]}
EMBEDDING = {"gpt2": "wte"}


def attention(family):
    return ATTENTION.get(family, ["q_proj", "v_proj"])


def embedding(family):
    return EMBEDDING.get(family, "embed_tokens")


@dataclass(frozen=True)
class Case:
    """One adapter, said to us and said to PEFT, on one family."""

    family: str
    ours: dict
    theirs: dict | None = None  # None: the two agree, bar names
    saves_embeddings: bool = False
    id: str = field(default="", compare=False)

    def spec(self):
        return LoRA(**self.ours)

    def config(self):
        settings = {
            "r": self.ours.get("rank", 8),
            "lora_alpha": self.ours.get("alpha", 16),
            "target_modules": self.ours.get("targets", "all-linear"),
            "use_rslora": self.ours.get("rslora", False),
            "rank_pattern": self.ours.get("rank_pattern", {}),
            "alpha_pattern": self.ours.get("alpha_pattern", {}),
            "exclude_modules": self.ours.get("exclude"),
            "layers_to_transform": self.ours.get("layers"),
            "fan_in_fan_out": self.family == "gpt2",
            "task_type": "CAUSAL_LM",
        }
        return peft.LoraConfig(**{**settings, **(self.theirs or {})})


def _cases():
    for family in BUILDERS:
        make = partial(Case, family)
        small = {"rank": 4, "alpha": 8}
        yield make(small, id=f"{family}-all-linear")
        yield make({**small, "targets": attention(family)}, id=f"{family}-list")
        yield make({**small, "rslora": True}, id=f"{family}-rslora")
        yield make(
            {
                **small,
                # PEFT sorts the keys when it saves, and the first hit wins: keep them sorted
                "rank_pattern": {r"1\..*proj": 6, attention(family)[0]: 2},
                "alpha_pattern": {r".*\.0\..*": 3, attention(family)[-1]: 20},
            },
            id=f"{family}-patterns",
        )
        yield make(
            {**small, "targets": [embedding(family), *attention(family)]},
            saves_embeddings=True,
            id=f"{family}-embedding",
        )
    yield Case("llama", {"rank": 4, "alpha": 0.3, "rslora": True}, id="llama-float-alpha")
    yield Case("llama", {"rank": 4, "targets": r".*\.1\.mlp\.(up|down)_proj"}, id="llama-regex")
    yield Case("gpt2", {"rank": 4, "targets": r".*\.h\.0\..*c_(attn|proj|fc)"}, id="gpt2-regex")
    yield Case("llama", {"rank": 4, "exclude": ["o_proj", "mlp.up_proj"]}, id="llama-exclude-list")
    yield Case("llama", {"rank": 4, "exclude": r".*\.mlp\..*"}, id="llama-exclude-regex")
    yield Case("llama", {"rank": 4, "layers": [1]}, {"target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]}, id="llama-layers")  # fmt: skip
    yield Case("gpt2", {"rank": 4, "layers": [0], "targets": ["c_attn", "c_fc"]}, id="gpt2-layers")
    yield Case(
        "llama",
        {"rank": 4, "targets": ["lm_head", "q_proj"]},
        saves_embeddings=True,
        id="llama-head",
    )
    yield Case(
        "llama",
        {"rank": 4, "targets": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        id="llama-full-names",
    )
    yield Case(
        "llama",
        {
            "rank": 4,
            "rslora": True,
            "rank_pattern": {"q_proj": 2, "self_attn.q_proj": 7, "mlp.*": 3},
            "alpha_pattern": {"down_proj": 5, "mlp.*": 9},
        },
        id="llama-first-pattern-wins",
    )


CASES = list(_cases())
every_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def quietly(make):
    """Run ``make`` and drop PEFT's advice about tied weights and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def peft_model(case):
    base = BUILDERS[case.family]()
    model = quietly(lambda: peft.get_peft_model(base, case.config())).eval()
    return shake(model, std=0.1)


def peft_factors(model, name):
    """PEFT's A (rank, in) and B (out, rank) of one layer."""
    layer = model.base_model.model.get_submodule(name)
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def our_model(case):
    model = BUILDERS[case.family]()
    names = attach(model, case.spec(), seed=0)
    return model, names


def peft_names(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def tolerance(case):
    scale = logits(BUILDERS[case.family]()).abs().max().item()
    return {"rtol": 1e-6, "atol": 2e-6 * max(1.0, scale)}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_case
def test_the_same_layers_are_adapted_with_the_same_shapes_and_scales(case):
    theirs, (ours, names) = peft_model(case), our_model(case)
    assert set(names) == peft_names(theirs)
    for name in names:
        adapter = ours.get_submodule(name).adapter
        A, B = peft_factors(theirs, name)
        assert adapter.lora_A.shape == A.shape, name
        assert adapter.lora_B.shape == B.shape, name
        their_scale = theirs.base_model.model.get_submodule(name).scaling["default"]
        assert adapter.scale == pytest.approx(their_scale), name


@every_case
def test_forward_and_gradients_agree_with_weights_copied_across(case):
    theirs, (ours, names) = peft_model(case), our_model(case)
    with torch.no_grad():
        for name in names:
            adapter = ours.get_submodule(name).adapter
            A, B = peft_factors(theirs, name)
            adapter.lora_A.copy_(A)
            adapter.lora_B.copy_(B)
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(BUILDERS[case.family]()), atol=1e-2)
    close(logits(ours), expected)
    their_loss, our_loss = theirs(**batch()).loss, ours(**batch()).loss
    close(our_loss, their_loss)
    their_loss.backward()
    our_loss.backward()
    for name in names:
        adapter = ours.get_submodule(name).adapter
        A, B = peft_factors(theirs, name)
        close(adapter.lora_A.grad, A.grad)
        close(adapter.lora_B.grad, B.grad)


@every_case
def test_merging_agrees_with_theirs(case):
    if case.family in ("llama-tied", "gpt2", "gemma") and case.saves_embeddings:
        pytest.skip("one end of a tied pair is adapted: merging is refused, see test_attach")
    theirs, (ours, names) = peft_model(case), our_model(case)
    with torch.no_grad():
        for name in names:
            for mine, yours in zip(
                ours.get_submodule(name).adapter.parameters(),
                peft_factors(theirs, name),
                strict=True,
            ):
                mine.copy_(yours)
    merged = quietly(theirs.merge_and_unload)
    found, expected = merge(ours).state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


# ---------------------------------------------------------------- our files in PEFT


@every_case
def test_peft_loads_our_folder_to_the_same_logits_without_a_warning(case, tmp_path):
    ours, _ = our_model(case)
    expected = logits(shake(ours, std=0.1))
    save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(BUILDERS[case.family](), tmp_path / "adapter")
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert not [text for text in told if "tie_word_embeddings" not in text], told
    torch.testing.assert_close(logits(theirs.eval()), expected, **tolerance(case))


@every_case
def test_our_file_has_exactly_their_keys_shapes_and_fp32(case, tmp_path):
    ours, _ = our_model(case)
    save_adapter(ours, tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = quietly(
        lambda: get_peft_model_state_dict(peft_model(case), save_embedding_layers=False)
    )
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert {v.dtype for v in found.values()} == {torch.float32}


@every_case
def test_our_config_is_understood_by_their_config_class_without_a_warning(case, tmp_path):
    ours, _ = our_model(case)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig)
    assert config.r == case.config().r
    assert config.lora_alpha == case.config().lora_alpha
    assert config.use_rslora == case.config().use_rslora
    assert config.init_lora_weights is True  # else PEFT would decompose the base again


def test_fan_in_fan_out_is_written_for_conv1d_layers(tmp_path):
    model = gpt2()
    attach(model, LoRA(rank=4))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_the_order_of_patterns_survives_our_file_in_peft_and_here(tmp_path):
    case = Case(
        "llama",
        {
            "rank": 4,
            "alpha": 8,
            "rank_pattern": {"q_proj": 2, r"1\..*proj": 6},
            "alpha_pattern": {"v_proj": 3, r".*\.0\..*": 20},
        },
    )
    ours, _ = our_model(case)
    expected = logits(shake(ours, std=0.1))
    save_adapter(ours, tmp_path)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path)).eval()
    again = llama()
    load_adapter(again, tmp_path)
    close(logits(theirs), expected, 1e-6)
    close(logits(again), expected, 1e-6)


def test_peft_loads_an_adapter_trained_here_on_a_bf16_base(tmp_path):
    model = llama().bfloat16()
    attach(model, LoRA(rank=4))
    expected = logits(shake(model, std=0.1))
    save_adapter(model, tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path)).eval()
    assert (logits(theirs) - expected).abs().mean() < 5e-3  # bf16 rounds at 4e-3 near 1
    assert (logits(llama().bfloat16()) - expected).abs().mean() > 5e-2


# ---------------------------------------------------------------- their folders here


@every_case
def test_we_load_their_folder_to_the_same_logits(case, tmp_path):
    theirs = peft_model(case)
    expected = logits(theirs)
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours = BUILDERS[case.family]()
    before = base_bytes(ours)
    names = load_adapter(ours, tmp_path)
    assert set(names) == peft_names(theirs)
    torch.testing.assert_close(logits(ours.eval()), expected, **tolerance(case))
    assert base_bytes(ours) == before
    detach(ours)
    assert base_bytes(ours) == before


@every_case
def test_a_folder_of_theirs_comes_back_from_us_unchanged_in_meaning(case, tmp_path):
    theirs = peft_model(case)
    expected = logits(theirs)
    quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    ours = BUILDERS[case.family]()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    again = quietly(
        lambda: peft.PeftModel.from_pretrained(BUILDERS[case.family](), tmp_path / "ours")
    )
    torch.testing.assert_close(logits(again.eval()), expected, **tolerance(case))


def small_case():
    return Case("llama", {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]})


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def saved_by_peft(folder, case=None, **changes):
    """A PEFT folder with its config edited; returns the logits it was saved with."""
    theirs = peft_model(case or small_case())
    quietly(lambda: theirs.save_pretrained(folder))
    edit_config(folder, **changes)
    return logits(theirs)


def test_a_minimal_config_of_four_fields_loads(tmp_path):
    expected = saved_by_peft(tmp_path)
    full = json.loads((tmp_path / "adapter_config.json").read_text())
    minimal = {k: full[k] for k in ("peft_type", "target_modules", "r", "lora_alpha")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(minimal))
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), expected, 1e-6)


def test_a_bf16_file_loads_into_fp32_parameters(tmp_path):
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: value.bfloat16() for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = llama()
    load_adapter(model, tmp_path)
    adapter = model.model.layers[0].self_attn.q_proj.adapter
    stored = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert adapter.lora_A.dtype == torch.float32
    assert torch.equal(adapter.lora_A, stored.float())


def test_an_adapter_loaded_from_peft_trains_on(tmp_path):
    saved_by_peft(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    before = base_bytes(model)
    assert {name.rsplit(".", 1)[-1] for name in trainable(model)} == {"lora_A", "lora_B"}
    start = model(**batch()).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert model(**batch()).loss < start
    assert base_bytes(model) == before


def test_saved_dropout_is_read(tmp_path):
    saved_by_peft(tmp_path, lora_dropout=0.5)
    model = llama()
    load_adapter(model, tmp_path)
    model.train()
    assert not torch.equal(logits(model), logits(model))


RESULT_CHANGING = {
    "lora_bias": True,
    "bias": "all",
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [0, 2]],
    "alora_invocation_tokens": [3, 4],
    "a_field_from_the_future": 3,
}


@pytest.mark.parametrize("field", RESULT_CHANGING)
def test_a_setting_that_changes_results_and_is_unknown_here_is_refused_by_name(field, tmp_path):
    saved_by_peft(tmp_path, **{field: RESULT_CHANGING[field]})
    model = llama()
    before = model.state_dict().keys()
    with pytest.raises((ValueError, NotImplementedError), match=field):
        load_adapter(model, tmp_path)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq"]
)
def test_an_initialiser_that_rewrites_the_base_on_load_is_refused_by_name(start, tmp_path):
    saved_by_peft(tmp_path, init_lora_weights=start)
    with pytest.raises((ValueError, NotImplementedError), match=start):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("start", ["gaussian", False, True])
def test_an_initialiser_that_leaves_the_base_alone_is_accepted(start, tmp_path):
    expected = saved_by_peft(tmp_path, init_lora_weights=start)
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), expected, 1e-6)


def test_a_real_pissa_folder_is_never_silently_wrong(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = quietly(lambda: peft.get_peft_model(llama(), config)).eval()
    quietly(lambda: shake(theirs).save_pretrained(tmp_path))
    with pytest.raises((ValueError, NotImplementedError), match="pissa"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_setting_that_is_off_is_accepted(value, tmp_path):
    expected = saved_by_peft(tmp_path, a_field_from_the_future=value)
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), expected, 1e-6)


def test_an_embedding_matrix_stored_beside_the_adapter_is_never_silently_dropped(tmp_path):
    case = Case("llama", {"rank": 4, "targets": ["embed_tokens"]})
    theirs = peft_model(case)
    with torch.no_grad():
        token = batch()["input_ids"][0, 0]
        theirs.base_model.model.model.embed_tokens.weight[token] += 1.0  # a retrained row
    expected = logits(theirs)
    quietly(lambda: theirs.save_pretrained(tmp_path, save_embedding_layers=True))
    model = llama()
    try:
        load_adapter(model, tmp_path)
    except ValueError as error:
        assert "embed_tokens" in str(error)  # noqa: PT017 (refusing is one of two right answers)
    else:
        close(logits(model), expected, 1e-6)


@pytest.mark.parametrize(
    "unset", [{"layers_to_transform": []}, {"exclude_modules": []}, {"rank_pattern": {}}]
)
def test_an_empty_narrowing_field_means_what_it_means_in_peft(unset, tmp_path):
    expected = saved_by_peft(tmp_path, **unset)
    theirs = quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path)).eval()
    close(logits(theirs), expected, 1e-6)
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), expected, 1e-6)


def test_dropping_fan_in_fan_out_from_a_gpt2_config_changes_nothing(tmp_path):
    case = Case("gpt2", {"rank": 4, "targets": ["c_attn"]})
    expected = saved_by_peft(tmp_path, case, fan_in_fan_out=False)
    model = gpt2()
    load_adapter(model, tmp_path)
    close(logits(model), expected, 1e-6)
