"""Two processes under every strategy against one: losses, gradients, adapters, checkpoints.

All cases of two ranks run in one pair of processes, one after the other: starting takes longer
than any of them.
"""

import json
import sys
import warnings
from itertools import combinations, product

import pytest
import torch

from lit_adapters import load_adapter
from tests import models
from tests.distributed import train
from tests.distributed.covering import pairs, pairwise
from tests.distributed.processes import log_of, run_ranks
from tests.models import trainable

SPREAD = ["ddp", "fsdp", "fsdp2"]
EVERY = ["single", *SPREAD]
OWN_OPTIONS = ["fsdp, own units", "fsdp, SHARD_GRAD_OP", "fsdp, NO_SHARD"]
LIMIT = 1200  # seconds for a pair; a case takes one where nothing else runs

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and FSDP on Linux"),
    pytest.mark.timeout(1500),
]

BF16 = {
    "dtype": "bfloat16",
    "settings": {"dtype": "bfloat16"},
    "trainer": {"precision": "bf16-true"},
    "apart": True,  # a shared product sums gradients in another order, which bf16 shows
}
METHODS = {
    "lora": {"adapter": "LoRA(rank=4)"},
    "dora": {"adapter": "DoRA(rank=4)"},
    "pissa": {"callbacks": ["InitAdapters(PiSSA(niter=None))"]},
    # SGD: its first step does not depend on signs, which rounding may turn in the exact SVD.
    "lora_ga": {"callbacks": ["InitAdapters(LoRAGA(niter=None), batches=2)"], "optimizer": "sgd"},
    "llama_adapter": {"adapter": "LLaMAAdapter(prompt_length=3, top_layers=2)"},
    "prefix": {"adapter": "PrefixTuning(length=3)"},
    "full": {"adapter": "FullFineTuning()"},
}
VARIANTS = {
    "clip": {"trainer": {"gradient_clip_val": 0.05}},
    "clip value": {"trainer": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}},
    "recompute": {"settings": {"gradient_checkpointing": "full"}},
    "padded": {"batching": "padded"},
}
# Every method by itself, what is no method, and (MATRIX) pairs of all that combines.
CASES = {
    **METHODS,
    "lora_ga randomised": {
        "adapter": "LoRA(rank=2)",
        "callbacks": ["InitAdapters(LoRAGA(), batches=2)"],
    },
    "lora clip": {**METHODS["lora"], **VARIANTS["clip"]},
    "full clip": {**METHODS["full"], **VARIANTS["clip"]},
    "full clip value": {**METHODS["full"], **VARIANTS["clip value"]},
    "llama_adapter padded": {**METHODS["llama_adapter"], **VARIANTS["padded"]},
    "one layer": {"adapter": "LoRA(rank=4, targets=['q_proj'], layers=[1])"},
    "embeddings and head": {"adapter": "LoRA(rank=4, targets=['embed_tokens', 'lm_head'])"},
    "tied": {**METHODS["full"], "model": "llama_tied"},
    "gpt2": {"model": "gpt2"},
    "gemma": {**METHODS["dora"], "model": "gemma"},
    "guard": {"callbacks": ["SpikeGuard('skip')"]},
    "past the check of a stand": {"trainer": {"max_steps": 11}, "optimizer": "sgd"},
    "a rank with nothing to train": {"mutes": True, "batching": "padded"},
    "a rank with nothing to train in full": {
        **METHODS["full"],
        "mutes": True,
        "batching": "padded",
    },
    "new tokens": {"adapter": "LoRA(rank=4, new_tokens=['<one>', '<two>'])"},
    "qlora": {"settings": {"quantization": "BitsAndBytes(kind='nf4', storage='float32')"}},
    "qlora in bytes": {"settings": {"quantization": "BitsAndBytes(kind='nf4')"}},
    "trained copies": {"adapter": "LoRA(rank=4, modules_to_save=['lm_head'])"},
    "fitted before": {"callbacks": ["InitAdapters(PiSSA(niter=None))"], "fitted_before": True},
    "passed in": {"passed_in": True},
    "olora passed in": {"callbacks": ["InitAdapters(OLoRA())"], "passed_in": True},
}
REFUSED = {  # under FSDP1
    "trained copies": "WholeModules puts trained copies in the place",
    "qlora in bytes": "model.layers.0 are of torch.float32 and torch.uint8",
}
READ_BY_ALL = {
    "lora_ga",
    "lora_ga randomised",
    "qlora",
    "qlora in bytes",
    "passed in",
    "olora passed in",
}
RESUMED = ["lora", "pissa", "full"]
FACTORS = {
    "strategy": SPREAD,
    "method": list(METHODS),
    "bf16": [False, True],
    "accumulate": [False, True],
    "clip": [False, True],
    "recompute": [False, True],
}
MATRIX = pairwise(FACTORS)


def combined(method, bf16, accumulate, clip, recompute):
    """A case of several of the factors at once."""
    settings = VARIANTS["recompute"]["settings"] if recompute else {}
    trainer = {"accumulate_grad_batches": 2 if accumulate else 1}
    trainer |= VARIANTS["clip"]["trainer"] if clip else {}
    # Not read from files, which leave rotary frequencies in fp32: `tolerances` are of others.
    low = {**BF16, "settings": {}, "passed_in": True} if bf16 else {"settings": {}, "trainer": {}}
    return {
        **METHODS[method],
        **low,
        "settings": {**low["settings"], **settings},
        "trainer": {**low["trainer"], **trainer},
    }


def tolerances(method, bf16):
    """Of losses and norms, and of what was trained."""
    if not bf16:
        return 1e-5, 1e-5
    # bf16 rounds to 3 digits, and batches of other shapes are summed in another order. Weights that
    # are trained in bf16, and the norm, may be rounded to the next number. The SVD that LoRA-GA
    # starts from enlarges the rounding of gradients, in the factors more than in what they do.
    return {"full": (8e-3, 2e-2), "lora_ga": (2e-3, 5e-2)}.get(method, (1e-3, 1e-3))


def levels(case):
    """A case of MATRIX without its strategy, as a key; and its strategy."""
    return tuple(case[name] for name in FACTORS if name != "strategy"), case["strategy"]


def said(case):
    return "-".join([case["method"], case["strategy"], *(k for k in case if case[k] is True)])


class Ranks:
    """What cases gave, by name and strategy: one result a rank."""

    def __init__(self, folder):
        self.folder = folder
        self.found = {}

    def single(self, cases):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for key, case in cases.items():
                self.found[key] = [train.run({"folder": str(self.folder), **case})]

    def pair(self, cases, limit=LIMIT, script=train):
        """Run cases in two processes; a case that raised is an error text."""
        out = self.folder / "results"
        out.mkdir()
        listed = [{"folder": str(self.folder), **case} for case in cases.values()]
        (self.folder / "cases.json").write_text(json.dumps(listed))
        for case in listed:
            train.saved_base(case)
        run_ranks(script.__file__, [self.folder / "cases.json", out], out, limit)
        for number, key in enumerate(cases):
            self.found[key] = [self._read(out, number, rank) for rank in range(2)]

    def _read(self, out, number, rank):
        file = out / f"{number}-{rank}.pt"
        if not file.exists():
            return {"error": f"no result; the log ends: {log_of(out, rank)[-2000:]}"}
        return torch.load(file, weights_only=False)

    def __getitem__(self, key):
        for result in self.found[key]:
            assert "error" not in result, result["error"]
        return self.found[key]


def keeping(folder, name, strategy):
    return {**METHODS[name], "strategy": strategy, "keep": str(folder / f"{name}-{strategy}")}


def going_on(folder, name, before, after):
    last = folder / f"{name}-{before}" / "last.ckpt"
    longer = {"trainer": {"max_steps": 5}}  # into the second epoch
    return {**METHODS[name], **longer, "strategy": after, "resume": str(last)}


def evaluated(folder, strategy):
    """Validate while training; then validate, test and predict; answer at every occasion."""
    place = folder / strategy
    scores = str(place / "scores.json")
    return {
        "strategy": strategy,
        "predictions": str(place / "predictions.jsonl"),
        "trainer": {"default_root_dir": str(place), "limit_val_batches": 1.0},
        "callbacks": [f"SampleGenerations(limit=5, max_new_tokens=3, scores_file={scores!r})"],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = Ranks(folder)
    done.single({(name, "single"): case for name, case in CASES.items()})
    matrix = dict.fromkeys(levels(case)[0] for case in MATRIX)
    done.single({(key, "single"): combined(*key) for key in matrix})
    longer = {"trainer": {"max_steps": 5}}
    done.single({(name, "whole"): {**METHODS[name], **longer} for name in RESUMED})
    done.single({(name, "kept", "single"): keeping(folder, name, "single") for name in RESUMED})
    done.single({("evaluated", "single"): evaluated(folder, "single")})
    done.single({("read in bf16", "single"): BF16})
    window = {"batch": 2, "trainer": {"accumulate_grad_batches": 2}}
    done.pair(
        {
            **{(n, s): {**case, "strategy": s} for n, case in CASES.items() for s in SPREAD},
            **{(k, s): {**combined(*k), "strategy": s} for k, s in map(levels, MATRIX)},
            **{("window", s): {**window, "strategy": s} for s in SPREAD},
            **{(n, "kept", s): keeping(folder, n, s) for n in RESUMED for s in SPREAD},
            **{
                (n, s, t): going_on(folder, n, s, t) for n in RESUMED for s in EVERY for t in SPREAD
            },
            **{
                (n, s): {**CASES[f"{n} clip"], "strategy": s}
                for n in ("lora", "full")
                for s in OWN_OPTIONS
            },
            **{("read in bf16", s): {**BF16, "strategy": s} for s in SPREAD},
            **{("no base", s): {"base": "./nowhere", "strategy": s} for s in SPREAD},
            ("not pinned",): {**going_on(folder, "pissa", "single", "fsdp2"), "callbacks": []},
            **{("evaluated", s): evaluated(folder, s) for s in SPREAD},
        }
    )
    done.single(
        {(n, s, "single"): going_on(folder, n, s, "single") for n in RESUMED for s in EVERY}
    )
    return done


def deviations(found, expected):
    """The largest of |a - b| / (1 + |b|) over losses and norms, and over what was trained."""
    steps = len(found["loss"])
    assert steps > 0
    assert found["state"].keys() == expected["state"].keys()
    logged = [(found[key], expected[key][-steps:]) for key in ("loss", "norm")]
    trained = [(found["state"][name], value) for name, value in expected["state"].items()]
    return largest(logged), largest(trained)


def largest(couples):
    apart = [(torch.as_tensor(a).double(), torch.as_tensor(b).double()) for a, b in couples]
    found = torch.stack([((a - b).abs() / (1 + b.abs())).max() for a, b in apart if a.numel()])
    return float(found.max())  # NaN if one is


def within(found, allowed):
    return all(one <= most for one, most in zip(found, allowed, strict=True))


def assert_equal_runs(found, expected, tolerance=1e-5):
    apart = deviations(found, expected)
    assert within(apart, (tolerance, tolerance)), apart


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_does(ranks, name, strategy):
    if strategy == "fsdp" and name in REFUSED:
        for result in ranks.found[name, strategy]:
            assert REFUSED[name] in result["error"]
            assert "Take FSDP2" in result["error"]
        return
    (expected,) = ranks[name, "single"]
    for found in ranks[name, strategy]:
        assert_equal_runs(found, expected)


def test_every_pair_of_factors_is_in_the_matrix():
    met = set().union(*map(pairs, MATRIX))
    count = 0
    for (one, some), (other, more) in combinations(sorted(FACTORS.items()), 2):
        for pair in product(some, more):
            count += 1
            assert ((one, pair[0]), (other, pair[1])) in met
    assert count == len(met)


def test_fewer_cases_could_not_meet_all_pairs():
    assert len(MATRIX) == len(SPREAD) * len(METHODS)  # those alone are so many pairs


@pytest.mark.parametrize("case", MATRIX, ids=said)
def test_two_ranks_combine_methods_and_settings_as_one_does(ranks, case):
    key, strategy = levels(case)
    (expected,) = ranks[key, "single"]
    for found in ranks[key, strategy]:
        apart = deviations(found, expected)
        assert within(apart, tolerances(case["method"], case["bf16"])), apart


@pytest.mark.parametrize("strategy", OWN_OPTIONS)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_user_s_own_options_of_fsdp_are_kept(ranks, name, strategy):
    (expected,) = ranks[f"{name} clip", "single"]
    for found in ranks[name, strategy]:
        assert_equal_runs(found, expected)
        assert found["units"] == 3
        sharded = found["held"] < 0.8 * expected["held"]
        assert sharded == (strategy != "fsdp, NO_SHARD")


@pytest.mark.parametrize("strategy", SPREAD)
def test_two_ranks_with_two_micro_batches_are_one_with_four_examples(ranks, strategy):
    (expected,) = ranks["lora", "single"]
    for found in ranks["window", strategy]:
        assert_equal_runs(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", ["lora", "pissa", "lora_ga", "prefix"])
def test_ranks_hold_one_model_before_it_is_sharded(ranks, name, strategy):
    first, second = ranks[name, strategy]
    assert first["start"] == second["start"]
    if name != "lora_ga":  # whose gradients are summed in another order
        assert first["start"] == ranks[name, "single"][0]["start"]


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", CASES)
def test_one_rank_reads_what_others_shard_unless_it_says_why_not(ranks, name, strategy):
    if strategy == "ddp" or (strategy == "fsdp" and name in REFUSED):
        return
    first, second = ranks[name, strategy]
    assert not first["received"]
    assert second["received"] == (name not in READ_BY_ALL)
    assert bool(first["said"]) == (name in READ_BY_ALL)


@pytest.mark.parametrize(
    ("case", "reason"),
    {
        ("passed in", "fsdp2"): "it was passed in as a model, which every rank has built",
        ("qlora", "fsdp"): "it is quantised on the device of each rank while it is loaded",
        ("lora_ga", "fsdp"): "LoRAGA takes gradients on every rank",
        ("lora", "fsdp, own units"): "the auto_wrap_policy of FSDPStrategy takes a model that is "
        "whole on every rank",
    }.items(),
)
def test_what_every_rank_reads_is_said_with_the_reason(ranks, case, reason):
    for found in ranks[case]:
        assert found["said"] == [f"Every rank holds the whole base until it is sharded: {reason}."]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_what_one_rank_has_read_in_bf16_others_shard(ranks, strategy):
    (expected,) = ranks["read in bf16", "single"]
    for found, received in zip(ranks["read in bf16", strategy], (False, True), strict=True):
        assert found["received"] == received
        assert found["start"] == expected["start"]
        apart = deviations(found, expected)
        assert within(apart, tolerances("lora", True)), apart


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_what_the_reading_rank_lacks_is_said_on_all(ranks, strategy):
    first, second = ranks.found["no base", strategy]
    assert "base './nowhere' is not a folder" in first["error"].splitlines()[-1]
    assert (
        "rank 0, which reads the base for all ranks of this machine, failed with "
        "FileNotFoundError: base './nowhere' is not a folder" in second["error"]
    )


@pytest.mark.parametrize("name", ["lora", "pissa", "full"])
def test_each_rank_holds_a_shard(ranks, name):
    (whole,) = ranks[name, "single"]
    adapter = whole["adapter_bytes"]
    for rank in range(2):
        ddp, fsdp, fsdp2 = (ranks[name, strategy][rank] for strategy in SPREAD)
        assert ddp["held"] == whole["held"]
        # FSDP fills units up to a multiple of the ranks.
        assert fsdp["held"] == pytest.approx(adapter + (whole["held"] - adapter) / 2, rel=0.03)
        assert fsdp2["held"] == pytest.approx(whole["held"] / 2, rel=0.03)
        assert fsdp["units"] == fsdp2["units"] == 3  # two layers and the rest
        assert ddp["units"] == 0


@pytest.mark.parametrize("after", EVERY)
@pytest.mark.parametrize("before", EVERY)
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_resumed_under_any_strategy(ranks, name, before, after):
    (expected,) = ranks[name, "whole"]
    for found in ranks[name, before, after]:
        assert len(found["loss"]) == 2
        assert_equal_runs(found, expected)


def test_another_start_than_the_checkpoint_s_is_refused_where_nothing_can_be_added(ranks):
    for found in ranks.found[("not pinned",)]:
        assert "lora_A0 is in one alone" in found["error"]
        assert "take the InitAdapters callback" in found["error"]


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_one_file_of_what_is_trained_by_name(ranks, name, strategy):
    (found, *_) = ranks[name, "kept", strategy]
    folder = ranks.folder / f"{name}-{strategy}"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert found["state"].keys() <= checkpoint["state_dict"].keys()
    beside = checkpoint["state_dict"].keys() - found["state"].keys()
    assert all(key.endswith(("lora_A0", "lora_B0")) for key in beside)
    assert bool(beside) == (name == "pissa")
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["state"].keys() == found["state"].keys()
    for key, value in found["state"].items():
        assert checkpoint["state_dict"][key].equal(value)
        assert optimizer["state"][key]["exp_avg"].shape == value.shape
    (alone,) = ranks[name, "kept", "single"]
    one = torch.load(ranks.folder / f"{name}-single" / "last.ckpt", weights_only=True)
    assert checkpoint["base_fingerprint"] == one["base_fingerprint"]
    assert alone["state"].keys() == found["state"].keys()
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", RESUMED)
def test_the_adapter_folder_is_whole(ranks, name, strategy):
    folder = ranks.folder / f"{name}-{strategy}" / "adapter"
    base = models.llama()
    load_adapter(base, folder)  # checks digests and the fingerprint of the base
    state = ranks[name, "kept", strategy][0]["state"]
    loaded = {f"model.{key}": value for key, value in trainable(base).items()}
    assert loaded.keys() == state.keys()
    assert all(loaded[key].equal(value) for key, value in state.items())
    config = ranks.folder / f"{name}-single" / "adapter" / "adapter_config.json"
    assert (folder / config.name).read_text() == config.read_text()


@pytest.mark.parametrize("strategy", SPREAD)
def test_validation_and_test_are_of_all_records(ranks, strategy):
    (expected,) = ranks["evaluated", "single"]
    for found in ranks["evaluated", strategy]:
        assert_equal_runs(found, expected)
        for stage in ("validation", "test"):
            assert found[stage] == pytest.approx(expected[stage], rel=1e-5)


@pytest.mark.parametrize("strategy", SPREAD)
def test_answers_are_complete_and_in_order(ranks, strategy):
    whole, spread = ranks.folder / "single", ranks.folder / strategy
    for name, count in {"predictions.jsonl": 7, "samples.jsonl": 5}.items():
        rows = (spread / name).read_text()
        assert rows == (whole / name).read_text(), name
        assert len(rows.splitlines()) == count
    shown, expected = ((place / "samples.csv").read_text() for place in (spread, whole))
    assert shown == expected  # before, at validations, after
    scores, one = (json.loads((place / "scores.json").read_text()) for place in (spread, whole))
    assert scores.pop("answers") == one.pop("answers")
    assert scores == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_product(tmp_path):
    done = Ranks(tmp_path)
    names = [name for name in FACTORS if name != "strategy"]
    keys = list(product(*(FACTORS[name] for name in names)))
    done.single({(key, "single"): combined(*key) for key in keys})
    done.pair({(k, s): {**combined(*k), "strategy": s} for k in keys for s in SPREAD}, limit=3000)
    worst, wrong = {}, []
    for key, strategy in product(keys, SPREAD):
        (expected,) = done[key, "single"]
        for found in done[key, strategy]:
            apart = deviations(found, expected)
            group = (key[0], "bf16" if key[1] else "fp32", strategy)
            worst[group] = [max(both) for both in zip(apart, worst.get(group, apart), strict=True)]
            wrong += [(key, strategy, apart)] if not within(apart, tolerances(*key[:2])) else []
    print(f"{len(keys) * len(SPREAD)} cases, {len(wrong)} ranks wrong; apart by at most, in losses")
    print("and norms, and in what was trained:")
    for group, apart in worst.items():
        print(*group, *(f"{one:.1e}" for one in apart))
    assert not wrong
