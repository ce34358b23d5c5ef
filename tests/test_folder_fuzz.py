"""Adapter folders spoilt at random: each is refused in words, or loads as what its files say.

The oracle reads the spoilt folder with safetensors and json alone, and says what every adapter must
hold and compute. A flipped bit in a weight makes another adapter, which nothing here can tell from
a good one: a safetensors file has no checksum.
"""

import copy
import json
import math
import random
import re
import resource
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_adapters import (
    DoRA,
    FullFineTuning,
    LLaMAAdapter,
    LoRA,
    PiSSA,
    PrefixTuning,
    attach,
    initialise,
    load_adapter,
    save_adapter,
)
from lit_adapters.__main__ import console
from lit_adapters.attachment import adapted_layers
from tests.models import base_bytes, llama, logits, shake, snapshot, trainable
from tests.test_io import CONFIG, EXTRA, WEIGHTS

SECONDS, MEGABYTES, CHARACTERS = 10, 500, 3000
PREFIX = "base_model.model."
SPECS = {
    "pissa": (LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"], rslora=True), PiSSA()),
    "lora": (
        LoRA(rank=4, targets=["down_proj", "embed_tokens"], alpha_pattern={r"0\..*": 6}),
        None,
    ),
    "dora": (DoRA(rank=2, targets=["o_proj", "up_proj"], rank_pattern={"o_proj": 3}), None),
    "prefix": (PrefixTuning(length=3), None),
    "prefix-own": (PrefixTuning(length=3, layers=[1]), None),
    "llama-adapter": (LLaMAAdapter(prompt_length=3, top_layers=2), None),
    "full": (FullFineTuning(targets=["k_proj", "norm"]), None),
}
PEFT = "peft"


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture(scope="module")
def good(base, tmp_path_factory):
    """Folders as they should be, by what is in them."""
    root = tmp_path_factory.mktemp("good")
    for name, (spec, start) in SPECS.items():
        model = copy.deepcopy(base)
        attach(model, spec, seed=0)
        if start is not None:
            initialise(model, start, seed=0)
        save_adapter(shake(model), root / name)
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = ["q_proj", "embed_tokens"]  # of an embedding PEFT saves the frozen weight too
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        shake(theirs).save_pretrained(root / PEFT, save_embedding_layers=True)
    return {folder.name: folder for folder in sorted(root.iterdir())}


# ---------------------------------------------------------------- the weights file


def weights_parts(folder):
    """Header of the weights file as a dict, and its data."""
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_weights(folder, header, data):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def keys_of(header):
    return sorted(key for key in header if key != "__metadata__")


def rewrite(change):
    """A mutation of the header: ``change`` gets a generator, the header and one key or two."""

    def mutate(rng, folder, other):
        header, data = weights_parts(folder)
        keys = keys_of(header)
        change(rng, header, rng.choice(keys), rng.choice(keys))
        write_weights(folder, header, data)

    return mutate


def flip(rng, data, first, last, count):
    spoilt = bytearray(data)
    for _ in range(count):
        spoilt[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def flipper(where):
    def mutate(rng, folder, other):
        raw = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        first, last = {"length": (0, 8), "header": (8, end), "data": (end, len(raw))}[where]
        (folder / WEIGHTS).write_bytes(flip(rng, raw, first, last, rng.choice([1, 1, 2, 20])))

    return mutate


def truncate(rng, folder, other):
    raw = (folder / WEIGHTS).read_bytes()
    cut = rng.choice([1, 4, 512, rng.randrange(len(raw))])
    (folder / WEIGHTS).write_bytes(raw[: max(0, len(raw) - cut)])


def extend(rng, folder, other):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 4, 4096])))


def swap_names(rng, header, one, two):
    header[one], header[two] = header[two], header[one]


def swap_data(rng, header, one, two):
    offsets = [header[key]["data_offsets"] for key in (one, two)]
    header[one]["data_offsets"], header[two]["data_offsets"] = offsets[::-1]


def other_shape(rng, header, one, two):
    shape = header[one]["shape"]
    odd = [shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], [], [0], [-1], [2**62] * 2]
    header[one]["shape"] = rng.choice([*odd, [float(n) for n in shape], "4", None, [2**64]])


def other_dtype(rng, header, one, two):
    odd = ["F16", "BF16", "F64", "I32", "U32", "BOOL", "F8_E4M3", "f32", "F31", "", None, 5]
    header[one]["dtype"] = rng.choice(odd)


def half_precision(rng, folder, other):
    """Weights as other tools store them: fewer bits, and the same adapter but for the rounding."""
    dtype = rng.choice([torch.float16, torch.bfloat16])
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def other_offsets(rng, header, one, two):
    start, end = header[one]["data_offsets"]
    odd = [[start + 4, end + 4], [end, start], [start, end - 1], [0, 0], [-1, end], [start]]
    odd += [[start, 2**63], [2**64, 2**65], [0.5, 3], None, header[two]["data_offsets"]]
    header[one]["data_offsets"] = rng.choice(odd)


def delete_key(rng, header, one, two):
    del header[one]


def rename_key(rng, header, one, two):
    odd = [one.removeprefix(PREFIX), one + "\0", one.upper(), "", "../../x", "é" * 3000, one + ".b"]
    header[rng.choice([*odd, one.replace(".0.", ".1.")])] = header.pop(one)


def metadata(rng, header, one, two):
    header["__metadata__"] = rng.choice([{}, {"format": "np"}, {"a": 1}, [], None, {"x": "y" * 99}])


def add_key(rng, header, one, two):
    odd = [one + "2", f"{PREFIX}model.layers.0.mlp.up_proj.weight", f"{PREFIX}lm_head.weight"]
    header[rng.choice(odd)] = copy.deepcopy(header[two])


def duplicate_key(rng, folder, other):
    header, data = weights_parts(folder)
    one, two = rng.choice(keys_of(header)), rng.choice(keys_of(header))
    text = json.dumps(header)[:-1] + f", {json.dumps(one)}: {json.dumps(header[two])}}}"
    write_weights(folder, text, data)


def special_values(rng, folder, other):
    header, data = weights_parts(folder)
    start, end = header[rng.choice(keys_of(header))]["data_offsets"]
    at = rng.randrange(start, end - 3) // 4 * 4
    bits = rng.choice(["7f800000", "ff800000", "7fc00000", "7f7fffff", "00000001", "80000000"])
    data = data[:at] + bytes.fromhex(bits)[::-1] + data[at + 4 :]
    write_weights(folder, header, data)


def other_bytes(rng, folder, other):
    odd = [b"", b"{}", bytes(8), b"\xff" * 9, (100).to_bytes(8, "little"), rng.randbytes(900)]
    (folder / WEIGHTS).write_bytes(rng.choice([*odd, (2).to_bytes(8, "little") + b"{}"]))


# ---------------------------------------------------------------- the two JSON files

NUMBERS = [0, -0.0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**400, 1e308, 1e-308, 0.5, 4.0]
TEXTS = ["", "q_proj", "all", "all-linear", "../../etc/passwd", "/", "\0", "\ud800", "𝒬", "LORA"]
TEXTS += ["(", ".*", "(a+)+$", r"(?:.*\.)?[kq]_proj", "[" * 500, r"(\w+\.?)+\d!", "%s%n{0}", "none"]
DEEP = "(" * 2000 + ")" * 2000
NESTED: object = {}
for _ in range(200):
    NESTED = [NESTED]
BIG = ["x" * 1_000_000, ["q_proj"] * 20_000, [str(n) for n in range(20_000)], list(range(20_000))]
BIG += [{str(n): n for n in range(5_000)}, NESTED, DEEP]
NOT_JSON = [float("nan"), float("inf"), -float("inf")]


def odd_value(rng, old):
    """A value that a field may be given: near the old one, of another type, or out of range."""
    lists = [[], [None], [[]], ["q_proj", 5], [0], [1], [-1], [10**400], ["q_proj"], ["self_attn"]]
    keys = [*TEXTS, "q_proj", "o_proj", r"0\..*"]
    tables = [{}, {"a": {}}, {rng.choice(keys): rng.choice([*NUMBERS, None, True, "2"])}]
    near = [old, [old], {"value": old}, str(old)]
    if isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        near += [old + 1, 2 * old, -old, float(old), old / 2]
    if isinstance(old, list):
        near += [old[:-1], old * 2, [*old, "nowhere"], old[0] if old else None]
    kinds = [NUMBERS, TEXTS, lists, tables, near, [None, True, False], NOT_JSON]
    return rng.choice(BIG if rng.random() < 0.08 else rng.choice(kinds))


def edit(name):
    def mutate(rng, folder, other):
        file = folder / name
        if not file.exists():  # PEFT writes no file of ours
            file.write_text("{}")
        content = json.loads(file.read_text())
        new = ["use_dora", "origin", "initialiser", "base_fingerprint", "gate", "modules_to_save"]
        new += ["bias", "trainable_token_indices", "exclude_modules", "layers_to_transform", "x\ny"]
        for _ in range(rng.choice([1, 1, 2])):
            key = rng.choice([*content, *content, rng.choice(new)])
            content[key] = odd_value(rng, content.get(key))
            if rng.random() < 0.15:
                del content[key]
        file.write_text(json.dumps(content))

    return mutate


def spoil_text(name):
    def mutate(rng, folder, other):
        raw = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        doubled = b'{"r": 5, "origin": "x",' + raw.lstrip()[1:]
        odd = [raw[: rng.randrange(len(raw))], flip(rng, raw, 0, len(raw), 1), doubled, b"\xff\xfe"]
        odd += [b"[" * 50_000, b"null", b"[]", b"", raw + raw, raw.decode().encode("utf-16")]
        (folder / name).write_bytes(rng.choice(odd))

    return mutate


# ---------------------------------------------------------------- files


def remove(rng, folder, other):
    (folder / rng.choice([CONFIG, WEIGHTS, EXTRA, "README.md"])).unlink(missing_ok=True)


def swap(rng, folder, other):
    name = rng.choice([CONFIG, WEIGHTS, EXTRA])
    if (other / name).exists():
        shutil.copy(other / name, folder / name)
    else:
        (folder / name).unlink()


def link(rng, folder, other):
    file = folder / rng.choice([CONFIG, WEIGHTS, EXTRA])
    inside = folder / "elsewhere"
    if file.exists():
        shutil.move(file, inside)
    targets = [inside, Path("elsewhere"), file, folder, "/dev/zero", "/nowhere", other / file.name]
    file.symlink_to(rng.choice(targets))


def not_a_file(rng, folder, other):
    file = folder / rng.choice([CONFIG, WEIGHTS, EXTRA])
    file.unlink(missing_ok=True)
    file.mkdir()


MUTATIONS = {
    "flip-length": flipper("length"),
    "flip-header": flipper("header"),
    "flip-data": flipper("data"),
    "truncate": truncate,
    "extend": extend,
    "swap-names": rewrite(swap_names),
    "swap-data": rewrite(swap_data),
    "shape": rewrite(other_shape),
    "dtype": rewrite(other_dtype),
    "half-precision": half_precision,
    "offsets": rewrite(other_offsets),
    "delete-key": rewrite(delete_key),
    "rename-key": rewrite(rename_key),
    "add-key": rewrite(add_key),
    "metadata": rewrite(metadata),
    "duplicate-key": duplicate_key,
    "special-values": special_values,
    "other-bytes": other_bytes,
    "edit-config": edit(CONFIG),
    "edit-config-again": edit(CONFIG),
    "edit-notes": edit(EXTRA),
    "config-text": spoil_text(CONFIG),
    "notes-text": spoil_text(EXTRA),
    "remove-file": remove,
    "swap-file": swap,
    "link": link,
    "not-a-file": not_a_file,
}


# ---------------------------------------------------------------- what the files say, read again

# Fields that say nothing about what the loaded model computes.
SILENT = set(
    "peft_type task_type inference_mode base_model_name_or_path revision auto_mapping peft_version "
    "fan_in_fan_out init_lora_weights loftq_config megatron_core qalora_group_size eva_config "
    "ensure_weight_tying runtime_config corda_config lora_ga_config".split()
)
LORA_FIELDS = set(
    "r lora_alpha lora_dropout target_modules use_rslora use_dora exclude_modules "
    "layers_to_transform rank_pattern alpha_pattern".split()
)
PREFIX_FIELDS = set(
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
    "encoder_hidden_size prefix_projection init_weights target_modules".split()
)
FIELDS = {
    "LORA": LORA_FIELDS,
    "LIT_LORA": LORA_FIELDS,
    "PREFIX_TUNING": PREFIX_FIELDS,
    "LIT_PREFIX": PREFIX_FIELDS,
    "ADAPTION_PROMPT": {"adapter_len", "adapter_layers", "target_modules"},
    "LIT_LLAMA_ADAPTER": {"adapter_len", "adapter_layers", "target_modules", "gate"},
    "LIT_FULL": {"target_modules"},
}


def meant(config, base):
    """Names that the config's targets mean."""

    def hit(name, wanted):
        if isinstance(wanted, str):
            whole = wanted == "all" or (wanted == "all-linear" and name != "lm_head")
            return whole or re.fullmatch(wanted, name) is not None
        return any(f".{name}".endswith(f".{ending}") for ending in wanted or [])

    narrowed = config if config["peft_type"] in ("LORA", "LIT_LORA") else {}
    exclude, layers = narrowed.get("exclude_modules"), narrowed.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    targets = config.get("target_modules") or ["self_attn"]
    if config["peft_type"] == "ADAPTION_PROMPT" and isinstance(targets, str):
        targets = [targets]
    if config["peft_type"] == "PREFIX_TUNING":
        targets = ["self_attn"]
    return {
        name
        for name, _ in base.named_modules()
        if name
        and hit(name, targets)
        and not (exclude and hit(name, exclude))
        and (not layers or any(int(n) in layers for n in re.findall(r"\.(\d+)\.", f".{name}.")[:1]))
    }


def check_lora(config, tensors, name, adapter, layer, weights):
    """The adapter holds what the file holds, and has the config's rank, scale and dropout."""

    def first(field, default):
        table = config.get(field) or {}
        return next((v for k, v in table.items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)

    lookup = isinstance(layer, nn.Embedding)
    keys = (
        ["lora_embedding_A", "lora_embedding_B"] if lookup else ["lora_A.weight", "lora_B.weight"]
    )
    A, B = (tensors[f"{PREFIX}{name}.{key}"].float() for key in keys)
    given = {"r": 8, "lora_alpha": 8, **{k: v for k, v in config.items() if v is not None}}
    rank, alpha = first("rank_pattern", given["r"]), first("alpha_pattern", given["lora_alpha"])
    assert rank == len(A)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    assert math.isclose(adapter.scale, scale, rel_tol=1e-12)
    assert adapter.dropout == (config.get("lora_dropout") or 0)
    held_A, held_B = [adapter.lora_A], [adapter.lora_B]
    if adapter.lora_A0 is not None:
        held_A.append(adapter.lora_A0)
        held_B.append(-adapter.lora_B0)
    assert torch.equal(torch.cat(held_A), A)
    assert torch.equal(torch.cat(held_B, 1), B)
    W = (layer.weight.T if lookup else layer.weight).detach().double()
    V = W + scale * B.double() @ A.double()
    if config.get("use_dora"):
        magnitude = tensors[f"{PREFIX}{name}.lora_magnitude_vector"].float().flatten()
        assert torch.equal(adapter.magnitude, magnitude)
        V = V * (magnitude.double() / V.norm(dim=1))[:, None]
    weights[name] = V.T if lookup else V


def turned_back(keys, length):
    """Rotary keys moved back by ``length`` positions, float64; Llama's halves, base 10000."""
    half = keys.shape[-1] // 2
    angle = length * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=-1)


def check_stacked_prefix(config, tensors, adapted):
    """PEFT's one tensor: for every layer keys, then values; keys are for positions from 0 on."""
    [tensor] = tensors.values()
    length = config["num_virtual_tokens"]
    parts = tensor.float().view(length, len(adapted), 2, *adapted[0].adapter.keys.shape[::2])
    for number, one in enumerate(adapted):
        keys, values = parts[:, number, 0].transpose(0, 1), parts[:, number, 1].transpose(0, 1)
        assert torch.equal(one.adapter.values, values)
        expected = turned_back(keys.double(), length).float()
        torch.testing.assert_close(one.adapter.keys.detach(), expected, rtol=1e-4, atol=1e-4)


def check_loaded(model, base, folder, names):
    """What was loaded is what the files say, and nothing else has changed."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    adapted = list(adapted_layers(model))
    kind, used = config["peft_type"], set()
    assert set(names) == {one.name for one in adapted} <= meant(config, base)
    for field in set(config) - SILENT - FIELDS[kind]:
        assert not config[field] or (field, config[field]) == ("bias", "none"), field
    weights = {}
    for name, layer, adapter in adapted:
        own = base.get_submodule(name)
        mine = {k: t for k, t in tensors.items() if k.startswith(f"{PREFIX}{name}.")}
        used |= mine.keys()
        if kind in ("LORA", "LIT_LORA"):
            check_lora(config, mine, name, adapter, own, weights)
        elif kind == "LIT_FULL":
            for key, value in own.named_parameters(recurse=False):
                held = layer.get_parameter(key)
                assert torch.equal(held, mine[f"{PREFIX}{name}.{key}"].to(value.dtype))
        elif kind == "LIT_PREFIX":
            assert len(adapter.keys[0]) == config["num_virtual_tokens"]
            assert torch.equal(adapter.keys, mine[f"{PREFIX}{name}.prefix_keys"].float())
            assert torch.equal(adapter.values, mine[f"{PREFIX}{name}.prefix_values"].float())
        elif kind != "PREFIX_TUNING":
            assert len(adapter.prompts) == config["adapter_len"]
            assert len(adapted) == config["adapter_layers"]
            assert adapter.spec.gate == config.get("gate", "scalar")
            assert torch.equal(adapter.prompts, mine[f"{PREFIX}{name}.adaption_prompt"][0].float())
            assert torch.equal(adapter.gate, mine[f"{PREFIX}{name}.adaption_gate"].float())
    if kind == "PREFIX_TUNING":
        check_stacked_prefix(config, tensors, adapted)
        used = tensors.keys()
    for key in tensors.keys() - used:  # at most a copy of what the base holds
        assert torch.equal(tensors[key], base.state_dict()[key.removeprefix(PREFIX)])
    changed = {f"{one.name}.weight" for one in adapted} if kind == "LIT_FULL" else set()
    found, stock = base_bytes(model), base_bytes(base)
    assert {k for k in stock if found[k] != stock[k]} <= changed
    assert found.keys() == stock.keys()
    parts = ("lora_A", "lora_B", "magnitude", "keys", "values", "prompts", "gate")
    assert {n.removesuffix(".weight") for n in changed} == {
        n.removesuffix(".weight") for n in trainable(model) if not n.endswith(parts)
    }
    if weights and all(bool((t.abs() < 100).all()) for t in tensors.values()):  # fp32 can do it
        dense = copy.deepcopy(base).double()
        for name, W in weights.items():
            dense.get_submodule(name).weight = nn.Parameter(W.contiguous())
        expected = logits(dense)
        assert (logits(model) - expected).abs().max() <= 1e-4 * (1 + expected.abs().max())


# ---------------------------------------------------------------- the fuzzer


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spoilt(good, number, where):
    """Copy one of the good folders, and spoil the copy: which and how depends on the number."""
    rng = random.Random(f"folder {number}")
    kinds, sources = list(MUTATIONS), list(good)
    kind = kinds[number % len(kinds)]
    source = sources[number // len(kinds) % len(sources)]
    folder = where / f"{number}-{kind}-{source}"
    shutil.copytree(good[source], folder)
    if rng.random() < 0.5 and (folder / EXTRA).exists():  # the digest would refuse nearly all
        notes = json.loads((folder / EXTRA).read_text())
        notes.pop("weights_sha256", None)
        (folder / EXTRA).write_text(json.dumps(notes))
    other = good[rng.choice([name for name in sources if name != source])]
    MUTATIONS[kind](rng, folder, other)
    return kind, source, folder, rng


def load_spoilt(model, folder, **options):
    """Load within the limits of time and memory; return the names, or None if it is refused."""
    before, memory, start = snapshot(model), peak_memory(), time.monotonic()
    names = error = None
    try:
        names = load_adapter(model, folder, **options)
    except (ValueError, OSError) as refusal:
        error = refusal
    assert time.monotonic() - start < SECONDS
    assert peak_memory() - memory < MEGABYTES
    if error is not None:
        assert type(error) is ValueError or isinstance(error, OSError), repr(error)
        assert str(folder) in str(error), error
        assert len(str(error)) < CHARACTERS, str(error)[:500]
        assert snapshot(model) == before
    return names


def fuzz(good, base, where, numbers):
    """Load spoilt folders; return how often which mutation was refused, and loaded."""
    outcomes = Counter()
    for number in numbers:
        kind, source, folder, rng = spoilt(good, number, where)
        model = copy.deepcopy(base)
        if rng.random() < 0.2:  # the model holds the adapter already, of other values
            load_adapter(model, good[source])
            shake(model)
        names = load_spoilt(model, folder, check_base=rng.random() < 0.8)
        outcomes[kind, "refused" if names is None else "loaded"] += 1
        if names is not None:
            check_loaded(model, base, folder, names)
        shutil.rmtree(folder)
    return outcomes


def check_outcomes(outcomes, total):
    """Every mutation was tried, and both outcomes were seen, also of single mutations."""
    print(f"\n{'mutation':20}{'refused':>9}{'loaded':>8}")
    for kind in MUTATIONS:
        print(f"{kind:20}{outcomes[kind, 'refused']:9}{outcomes[kind, 'loaded']:8}")
        assert outcomes[kind, "refused"] + outcomes[kind, "loaded"] >= total // len(MUTATIONS)
    counted = {o: sum(n for (_, k), n in outcomes.items() if k == o) for o in ("refused", "loaded")}
    print(f"{'all':20}{counted['refused']:9}{counted['loaded']:8}")
    assert min(counted.values()) > 0.1 * total


def test_the_oracle_agrees_with_folders_that_are_whole(good, base):
    for folder in good.values():
        model = copy.deepcopy(base)
        check_loaded(model, base, folder, load_adapter(model, folder))


def test_a_few_spoilt_folders_are_refused_or_load_as_they_say(good, base, tmp_path):
    numbers = [n + len(MUTATIONS) * (n % len(good)) for n in range(3 * len(MUTATIONS))]
    check_outcomes(fuzz(good, base, tmp_path, numbers), len(numbers))


@pytest.mark.slow
def test_many_spoilt_folders_are_refused_or_load_as_they_say(good, base, tmp_path):
    numbers = range(1_000, 1_000 + 3 * len(MUTATIONS) * len(good))
    check_outcomes(fuzz(good, base, tmp_path, numbers), len(numbers))


@pytest.mark.parametrize("kind", ["truncate", "edit-config", "rename-key"])
def test_the_command_line_says_what_is_wrong_in_one_line(good, kind, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    shutil.copytree(good["pissa"], folder)
    MUTATIONS[kind](random.Random(3), folder, good["dora"])
    words = [
        "lit_adapters",
        "generate",
        "--adapter",
        str(folder),
        "--prompt",
        "a",
        "--base",
        "tiny",
    ]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.delenv("LIT_ADAPTERS_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        console()
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert str(folder) in message
    assert "Traceback" not in message


def test_a_pattern_that_calls_itself_is_refused(good, base, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(good["lora"], folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "rank_pattern": {"(?P<x>(?&x))": 2}}))
    assert load_spoilt(copy.deepcopy(base), folder) is None
