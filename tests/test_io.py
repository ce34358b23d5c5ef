"""The adapter folder: what is written, and that a load succeeds whole or changes nothing."""

import json
import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lit_adapters import (
    DoRA,
    FullFineTuning,
    LoRA,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.attachment import adapted_layers
from lit_adapters.folder import write_tensors
from tests.models import BUILDERS, gpt2, llama, llama_tied, logits, shake, snapshot, trainable

CONFIG, WEIGHTS, EXTRA, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "lit_adapters.json",
    "README.md",
)
SPEC = LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"])
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSALS = (ValueError, RuntimeError, OSError, NotImplementedError)


def trained(spec=SPEC, build=llama, seed=1, **base):
    model = build(**base)
    attach(model, spec, seed=0)
    return shake(model, seed=seed)


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    """Change fields of the config; ``...`` removes one."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def bare():
    return llama()


def adapted():
    return trained(seed=9)


def refuse_everywhere(folder, *words, **options):
    """Loading fails in words, on a bare and on an adapted model, and neither has changed."""
    messages = []
    for make in (bare, adapted):
        model = make()
        model.model.layers[0].train()
        before, state, output = snapshot(model), torch.get_rng_state(), logits(model)
        with pytest.raises(REFUSALS) as caught:
            load_adapter(model, folder, **options)
        message = str(caught.value)
        for word in words:
            assert str(word) in message, f"{word!r} is not in: {message}"
        assert snapshot(model) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(logits(model), output)
        messages.append(message)
    return messages


# ---------------------------------------------------------------- what is written


def test_the_folder_holds_exactly_four_files(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, EXTRA, CARD])
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_the_files_say_what_they_are(folder):
    config, extra = (json.loads((folder / name).read_text()) for name in (CONFIG, EXTRA))
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert config["init_lora_weights"] is True
    assert isinstance(extra, dict)
    assert "lit_adapters" in json.dumps(extra)
    with safe_open(folder / WEIGHTS, framework="pt") as reader:
        assert reader.metadata()["format"] == "pt"
    card = (folder / CARD).read_text()
    assert card.startswith("---\n")  # the hub reads a model card's front matter
    assert "base_model" in card or "lora" in card.lower()


def test_the_files_hold_fp32_of_the_adapters_only(folder):
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 2 * 4
    assert all(v.dtype == torch.float32 and ".lora_" in k for k, v in tensors.items())


def test_the_files_name_no_directory_of_this_machine(tmp_path):
    llama().save_pretrained(tmp_path / "secret-base")
    base = type(llama()).from_pretrained(tmp_path / "secret-base", local_files_only=True)
    attach(base, SPEC)
    save_adapter(base, tmp_path / "adapter")
    for name in (CONFIG, EXTRA, CARD):
        assert str(tmp_path) not in (tmp_path / "adapter" / name).read_text(), name


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = adapted().train()
    before, state = snapshot(model), torch.get_rng_state()
    save_adapter(model, tmp_path / "adapter")
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_the_same_adapter_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_adapter(trained(), tmp_path / name)
    for name in (CONFIG, WEIGHTS, EXTRA, CARD):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("case", ["fp32", "bf16", "transposed", "counter"])
def test_weights_are_written_byte_by_byte_as_safetensors_writes_them(case, tmp_path):
    kinds = {
        "fp32": (LoRA(rank=4), llama),
        "bf16": (FullFineTuning(), lambda: llama().bfloat16()),
        "transposed": (LoRA(rank=4, targets=["wte", "c_attn"], bias="adapter"), gpt2),
        "counter": (LoRA(rank=4, targets=["0"], modules_to_save=["1"]), normed),
    }
    model = trained(*kinds[case])
    save_adapter(model, tmp_path)
    adapted = list(adapted_layers(model))
    packed = adapted[0].adapter.spec.pack(model, adapted)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in packed.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.ones(2, 3).T])
def test_what_is_not_in_memory_as_it_is_to_be_written_is_refused(tensor, tmp_path):
    with pytest.raises(TypeError, match="AdapterCheckpoint"):
        write_tensors(tmp_path / "file", {"a": tensor})
    assert not list(tmp_path.iterdir())


def normed():
    """It counts batches in int64, in a tensor without dimensions."""
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()


def test_saving_a_bare_model_is_refused(tmp_path):
    for model in (llama(), detach(trained()), merge(trained())):
        with pytest.raises(ValueError, match="no adapter"):
            save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_missing_parents_are_made_and_a_string_is_a_path(tmp_path):
    path = tmp_path / "runs" / "7" / "adapter"
    save_adapter(trained(), str(path))
    assert load_adapter(llama(), str(path))


# ---------------------------------------------------------------- round trips

SPECS = {
    "plain": (llama, LoRA(rank=4)),
    "list": (llama, LoRA(rank=4, targets=["q_proj", "model.layers.1.mlp.up_proj"])),
    "regex": (llama, LoRA(rank=4, targets=r".*\.1\..*(up|q)_proj")),
    "narrowed": (llama, LoRA(rank=4, exclude=["o_proj"], layers=[1])),
    "rslora": (llama, LoRA(rank=5, alpha=3.5, rslora=True)),
    "alpha-zero": (llama, LoRA(rank=2, alpha=0)),
    "dropout": (llama, LoRA(rank=2, dropout=0.25)),
    "patterns": (
        llama,
        LoRA(
            rank=4,
            rank_pattern={"q_proj": 2, r"1\..*proj": 6},
            alpha_pattern={"v_proj": 3, r".*\.0\..*": 20},
        ),
    ),
    "embedding-and-head": (llama, LoRA(rank=4, targets=["embed_tokens", "lm_head", "v_proj"])),
    "tied": (llama_tied, LoRA(rank=4, targets=["embed_tokens", "v_proj"])),
    "conv1d": (gpt2, LoRA(rank=4, targets=["wte", "c_attn", "c_proj"])),
}


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("held", [False, True])
def test_an_adapter_comes_back_to_the_bit(case, held, tmp_path):
    build, spec = SPECS[case]
    source = trained(spec, build)
    save_adapter(source, tmp_path / "adapter")
    target = trained(spec, build, seed=5) if held else build()
    names = load_adapter(target, tmp_path / "adapter")
    assert set(names) == {n.rsplit(".adapter.", 1)[0] for n in trainable(source)}
    found, expected = trainable(target), trainable(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(logits(target), logits(source))
    again = tmp_path / "again"
    save_adapter(target, again)
    tensors = load_file(again / WEIGHTS)
    assert all(
        torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "adapter" / WEIGHTS).items()
    )
    third = build()
    load_adapter(third, again)
    assert torch.equal(logits(third), logits(source))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("spec", [SPEC, DoRA(rank=4), LoRA(rank=4, modules_to_save=["lm_head"])])
def test_what_was_loaded_has_memory_of_its_own(spec, held, tmp_path):
    save_adapter(trained(spec), tmp_path)
    model = trained(spec, seed=5) if held else llama()
    load_adapter(model, tmp_path)
    loaded = trainable(model)
    with (tmp_path / WEIGHTS).open("r+b") as file:  # in place, as other libraries save
        file.write(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert all(torch.equal(value, loaded[name]) for name, value in trainable(model).items())
    for name in loaded:
        parameter = model.get_parameter(name)
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def test_a_pinned_origin_shares_no_memory_with_the_factors(tmp_path):
    source = trained()
    for adapter in (one.adapter for one in adapted_layers(source)):
        adapter.pin()
    save_adapter(shake(source, seed=3), tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    own = [p for *_, adapter in adapted_layers(model) for p in adapter.parameters()]
    assert len(own) == 4 * 4
    assert len({p.untyped_storage().data_ptr() for p in own}) == len(own)


def test_a_loaded_adapter_follows_the_layers_mode_and_drops_in_training(tmp_path):
    save_adapter(trained(LoRA(rank=4, dropout=0.5)), tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_loading_does_not_touch_the_random_state(folder):
    model, state = llama(), torch.get_rng_state()
    load_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_saved_on_a_half_precision_base_loads_on_the_fp32_base_and_back(tmp_path, dtype):
    half = trained(build=lambda: llama().to(dtype))
    save_adapter(half, tmp_path / "half")
    full = llama()
    load_adapter(full, tmp_path / "half")
    save_adapter(full, tmp_path / "full")
    again = llama().to(dtype)
    load_adapter(again, tmp_path / "full")
    assert torch.equal(logits(again), logits(half))


# ---------------------------------------------------------------- the base it belongs to


def test_another_base_is_refused_with_the_remedy_and_accepted_on_demand(folder):
    model = llama(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="check_base=False"):
        load_adapter(model, folder)
    assert snapshot(model) == before
    assert load_adapter(model, folder, check_base=False)


def test_a_base_changed_after_saving_is_another_base(folder):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    with pytest.raises(ValueError, match="check_base=False"):
        load_adapter(model, folder)


def test_an_adapter_goes_back_on_its_base_after_detach_but_not_after_merge(folder):
    model = trained()
    detach(model)
    load_adapter(model, folder)
    merge(model)
    with pytest.raises(ValueError, match="check_base=False"):
        load_adapter(model, folder)


def test_a_folder_without_our_side_file_loads(folder):
    (folder / EXTRA).unlink()
    assert load_adapter(llama(seed=1), folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"base_fingerprint": 5}', "\x00"])
def test_a_broken_side_file_is_refused(folder, text):
    (folder / EXTRA).write_text(text)
    refuse_everywhere(folder)


# ---------------------------------------------------------------- tensors, strictly


def _drop(tensors):
    del tensors[KEY]


def _add(tensors):
    tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 32)


def _rename(tensors):
    tensors[KEY.removeprefix("base_model.model.")] = tensors.pop(KEY)


def _transpose(tensors):
    tensors[KEY] = tensors[KEY].T


def _other_rank(tensors):
    tensors[KEY] = torch.zeros(3, 32)


def _scalar(tensors):
    tensors[KEY] = torch.tensor(1.0)


def _empty(tensors):
    tensors[KEY] = torch.zeros(0, 32)


def _nan(tensors):
    tensors[KEY][2, 5] = float("nan")


def _infinite(tensors):
    tensors[KEY][0, 0] = -float("inf")


def _int64(tensors):
    tensors[KEY] = torch.ones(4, 32, dtype=torch.int64)


def _bool(tensors):
    tensors[KEY] = torch.ones(4, 32, dtype=torch.bool)


def _uint8(tensors):
    tensors[KEY] = torch.ones(4, 32, dtype=torch.uint8)


def _base_weight(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, [KEY, "missing"]),
        (_add, ["k_proj.lora_A.weight", "unexpected"]),
        (_base_weight, ["layers.0.self_attn.q_proj.weight", "unexpected"]),
        (_rename, [KEY, "missing", "unexpected"]),
        (_transpose, [KEY, "32, 4", "4, 32"]),
        (_other_rank, [KEY, "3, 32", "4, 32"]),
        (_scalar, [KEY, "4, 32"]),
        (_empty, [KEY, "0, 32", "4, 32"]),
        (_nan, [KEY, "NaN"]),
        (_infinite, [KEY, "nfinite"]),
        (_int64, [KEY, "I64"]),
        (_bool, [KEY, "BOOL"]),
        (_uint8, [KEY, "U8"]),
        (dict.clear, ["missing"]),
    ],
)
def test_tensors_that_are_not_exactly_those_expected_are_refused_by_key(folder, change, words):
    edit_tensors(folder, change)
    refuse_everywhere(folder, WEIGHTS, *words)


def test_a_value_too_large_for_fp32_is_refused(folder):
    def huge(tensors):
        tensors[KEY] = torch.full((4, 32), 1e300, dtype=torch.float64)

    edit_tensors(folder, huge)
    refuse_everywhere(folder, KEY)


def _header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


def _one_tensor(**changes):
    entry = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512], **changes}
    text = json.dumps({KEY: entry}).encode()
    return _header(len(text), text) + bytes(512)


BROKEN_FILES = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "garbage": bytes(range(256)) * 40,
    "text": b"<html>404 not found</html>",
    "giant header": _header(2**62),
    "negative header": b"\xff" * 8 + b"{}",
    "header past the end": _header(90_000_000),
    "header not JSON": _header(4, b"oops"),
    "header a list": _header(2, b"[]"),
    "offsets past the end": _one_tensor(shape=[4, 3200], data_offsets=[0, 51200]),
    "offsets reversed": _one_tensor(data_offsets=[512, 0]),
    "shape and size differ": _one_tensor(shape=[4, 33]),
    "enormous shape": _one_tensor(shape=[2**40, 2**40]),
    "unknown dtype": _one_tensor(dtype="F7"),
    "pickle": pickle.dumps({KEY: 1}),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_weights_file_that_is_no_safetensors_file_is_refused_by_name(folder, kind):
    (folder / WEIGHTS).write_bytes(BROKEN_FILES[kind])
    refuse_everywhere(folder, WEIGHTS)


@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_a_truncated_weights_file_is_refused(folder, left):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(left * len(data))])
    refuse_everywhere(folder, WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    refuse_everywhere(folder, name)


def test_a_missing_folder_or_a_file_in_its_place_is_refused_by_name(tmp_path):
    refuse_everywhere(tmp_path / "nowhere", "nowhere")
    (tmp_path / "file").write_text("{}")
    refuse_everywhere(tmp_path / "file", "file")


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_never_opened(folder, tmp_path):
    mark = tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    for message in refuse_everywhere(folder, "adapter_model.bin", "safetensors"):
        assert "pickle" in message.lower()
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    refuse_everywhere(folder, WEIGHTS)
    assert not mark.exists()


def test_a_pickle_beside_the_weights_is_ignored(folder, tmp_path):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    model = llama()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(trained()))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_link_out_of_the_folder_is_refused(folder, name, tmp_path):
    outside = tmp_path / "elsewhere"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    refuse_everywhere(folder, name, "link")


def test_the_hub_cache_whose_files_are_links_to_blobs_loads(folder, tmp_path):
    snapshot_folder = tmp_path / "models--me--mine" / "snapshots" / "0a1b"
    blobs = tmp_path / "models--me--mine" / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.move(file, blobs / f"blob-of-{file.name}")
        (snapshot_folder / file.name).symlink_to(Path("../../blobs") / f"blob-of-{file.name}")
    model = llama()
    load_adapter(model, snapshot_folder)
    assert torch.equal(logits(model), logits(trained()))


def test_a_dangling_link_is_refused(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "nowhere")
    refuse_everywhere(folder, WEIGHTS)


# ---------------------------------------------------------------- the config, strictly


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[1]", "null", '"LORA"', "{'r': 8}", "[" * 100_000, "\ufeff{}", "NaN"],
    ids=["empty", "cut", "word", "list", "null", "string", "python", "deep", "bom", "nan"],
)
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / CONFIG).write_text(text, encoding="utf-8")
    refuse_everywhere(folder, CONFIG)


def test_a_config_in_another_encoding_is_refused(folder):
    (folder / CONFIG).write_bytes(b'{"r": "\xff\xfe"}')
    refuse_everywhere(folder, CONFIG)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", -4),
        ("r", 0),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", [4]),
        ("r", 10**9),
        pytest.param("r", 10**400, id="r-400-digits"),
        ("lora_alpha", "8"),
        ("lora_alpha", NAN),
        ("lora_alpha", INF),
        ("lora_alpha", True),
        pytest.param("lora_alpha", 10**400, id="lora_alpha-400-digits"),
        ("lora_dropout", 1.5),
        ("lora_dropout", -0.1),
        ("lora_dropout", "0.1"),
        ("lora_dropout", NAN),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("target_modules", ...),
        ("target_modules", None),
        ("target_modules", 5),
        ("target_modules", []),
        ("target_modules", [5]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "(q_proj"),
        ("target_modules", ["q_proj", "nowhere"]),
        ("exclude_modules", 5),
        ("exclude_modules", [None]),
        ("layers_to_transform", "0"),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [17]),
        ("rank_pattern", []),
        ("rank_pattern", {"q_proj": "2"}),
        ("rank_pattern", {"q_proj": -2}),
        ("rank_pattern", {"(q_proj": 2}),
        ("alpha_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(q_proj": 2}),
        ("peft_type", ...),
        ("peft_type", "IA3"),
        ("peft_type", "lora2"),
        ("peft_type", 3),
        ("peft_type", ["LORA"]),
    ],
)
def test_a_config_field_that_means_nothing_is_refused_by_file_and_value(folder, field, value):
    edit_config(folder, **{field: value})
    refuse_everywhere(folder, CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("bias", "lora_only"),  # on a model without biases
        ("bias", "some"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", {"embed_tokens": [1], "lm_head": [2]}),
        ("target_parameters", ["mlp.experts"]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
    ],
)
def test_a_setting_that_would_change_results_is_refused_in_words(folder, field, value):
    edit_config(folder, **{field: value})
    for message in refuse_everywhere(folder, CONFIG, field):
        assert len(message.partition(field)[2].split()) >= 4  # words, not a bare key


def test_a_folder_for_other_layers_is_refused_on_an_adapted_model(tmp_path):
    save_adapter(trained(LoRA(rank=4, targets=["k_proj"])), tmp_path)
    model = trained()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"k_proj|q_proj"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "other",
    [
        LoRA(rank=3, alpha=6, targets=["q_proj", "v_proj"]),  # the same scale, another rank
        LoRA(rank=4, alpha=9, targets=["q_proj", "v_proj"]),
        LoRA(rank=4, alpha=8.00001, targets=["q_proj", "v_proj"]),
        LoRA(rank=4, alpha=8, rslora=True, targets=["q_proj", "v_proj"]),
        LoRA(rank=4, alpha=8, alpha_pattern={"q_proj": 1}, targets=["q_proj", "v_proj"]),
    ],
)
def test_a_folder_of_another_rank_or_scale_is_refused_on_an_adapted_model(other, tmp_path):
    save_adapter(trained(other), tmp_path)
    model = trained()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_a_base_without_the_target_layers_is_refused(folder):
    model = gpt2()
    before = snapshot(model)
    for check_base in (True, False):
        with pytest.raises(REFUSALS):
            load_adapter(model, folder, check_base=check_base)
    assert snapshot(model) == before


# ---------------------------------------------------------------- saves that fail midway


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@contextmanager
def largest_file(limit):
    """Let no file grow past ``limit`` bytes: a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 400, 1000, 2500])
def test_a_save_that_runs_out_of_space_leaves_the_previous_folder(folder, limit):
    before = contents(folder)
    assert len(before[WEIGHTS]) > 2500
    model = trained(LoRA(rank=5, alpha=50, targets=["q_proj", "v_proj"]))
    with pytest.raises(Exception), largest_file(limit):  # noqa: B017, PT011 (which one is libc's)
        save_adapter(model, folder)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    loaded = llama()
    load_adapter(loaded, folder)
    assert torch.equal(logits(loaded), logits(trained()))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_save_that_dies_while_renaming_never_leaves_a_mixture(folder, fails_at, monkeypatch):
    old = trained()
    new = trained(LoRA(rank=4, alpha=80, targets=["q_proj", "v_proj"]), seed=5)
    calls = []

    def dying(original):
        def call(*arguments, **options):
            calls.append(arguments)
            if len(calls) >= fails_at:
                raise OSError("power cut")
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "renames"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            save_adapter(new, folder)
        except OSError:
            pass
        else:
            assert len(calls) < fails_at
    loaded = llama()
    try:
        load_adapter(loaded, folder)
    except REFUSALS as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        found = logits(loaded)
        assert torch.equal(found, logits(old)) or torch.equal(found, logits(new))


def test_a_save_that_fails_where_nothing_was_leaves_nothing_that_loads(tmp_path):
    with pytest.raises(Exception), largest_file(1000):  # noqa: B017, PT011
        save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(REFUSALS):
        load_adapter(llama(), tmp_path / "adapter")


def test_a_new_save_replaces_the_old_one_and_keeps_files_of_others(folder):
    (folder / "notes.txt").write_text("mine")
    model = trained(LoRA(rank=2, targets=["o_proj"]))
    save_adapter(model, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    loaded = llama()
    load_adapter(loaded, folder)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_over_a_link_does_not_write_through_it(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"not yours")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    save_adapter(trained(), folder)
    assert outside.read_bytes() == b"not yours"
    assert load_adapter(llama(), folder)


def test_settings_that_are_the_same_are_not_written_again(folder):
    before = {name: (folder / name).stat().st_ino for name in (CONFIG, EXTRA, WEIGHTS)}
    model = trained(seed=7)
    save_adapter(model, folder)
    after = {name: (folder / name).stat().st_ino for name in before}
    assert [name for name in before if before[name] == after[name]] == [CONFIG]
    loaded = llama()
    load_adapter(loaded, folder)
    assert torch.equal(logits(loaded), logits(model))


def test_a_link_to_the_same_settings_is_replaced_by_a_file(folder, tmp_path):
    (folder / CONFIG).rename(tmp_path / CONFIG)
    (folder / CONFIG).symlink_to(tmp_path / CONFIG)
    save_adapter(trained(), folder)
    assert not (folder / CONFIG).is_symlink()
    assert load_adapter(llama(), folder)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_saves_and_loads(family, tmp_path):
    model = trained(LoRA(rank=4), BUILDERS[family])
    save_adapter(model, tmp_path)
    loaded = BUILDERS[family]()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_of_different_settings_are_not_written_as_one(tmp_path):
    """One config would give the second model the scale of the first."""
    models = nn.ModuleList([llama(), llama(seed=1)])
    for model, alpha in zip(models, (4, 8), strict=True):
        attach(model, LoRA(rank=2, alpha=alpha))
    with pytest.raises(
        ValueError, match=r"'0\.\S+' and '1\.\S+' were.*alpha=4.*alpha=8.*one by one"
    ):
        save_adapter(models, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_names_in_a_folder_are_those_of_the_model_that_is_compiled(tmp_path):
    """As where a LightningModule holds ``torch.compile(model)``."""
    model = llama()
    attach(model, LoRA(rank=2))
    shake(model)
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "adapter")
    bare, wrapped = llama(), llama()
    load_adapter(bare, tmp_path / "adapter")
    load_adapter(torch.compile(wrapped, backend="eager"), tmp_path / "adapter")
    for found in (bare, wrapped):
        assert torch.equal(logits(found), logits(model))
