"""GaLore in two processes against one: losses, weights, bytes exchanged, checkpoints."""

import pytest
import torch

from tests.distributed import foreign
from tests.distributed.test_strategies import BF16, VARIANTS, Ranks, assert_equal_runs
from tests.distributed.test_strategies import pytestmark as pytestmark

SPREAD = ["ddp", "fsdp2"]
EVERY = ["single", *SPREAD]
RANK = 4


def galore(**settings):
    told = {"rank": RANK, "update_gap": 2, "scale": 1.0, "side": "right", **settings}
    return f"GaLore({', '.join(f'{key}={value!r}' for key, value in told.items())})"


FULL = {"adapter": "FullFineTuning()", "trainer": {"max_steps": 5}}  # three choices of subspaces


def variant(case):
    return {**case, "trainer": {**FULL["trainer"], **case.get("trainer", {})}}


CASES = {
    "galore": {"callbacks": [galore()]},
    "clip": {"callbacks": [galore()], **variant(VARIANTS["clip"])},
    "clip value": {"callbacks": [galore()], **variant(VARIANTS["clip value"])},
    "recompute": {"callbacks": [galore()], "settings": {"gradient_checkpointing": "full"}},
    "rotate": {"callbacks": [galore(moments="rotate")]},
    "reset": {"callbacks": [galore(moments="reset")]},
    "exact": {"callbacks": [galore(svd="exact")]},
    "coupled": {"callbacks": [galore(decay="coupled")]},
    "guard": {"callbacks": [galore(), "SpikeGuard('skip')"]},
    "tied": {"callbacks": [galore(targets=["embed_tokens", "up_proj"])], "model": "llama_tied"},
    "gpt2": {"callbacks": [galore()], "model": "gpt2"},
    "everything": {"callbacks": [galore()], "adapter": "FullFineTuning(targets='all-linear')"},
    "a rank with nothing to train": {
        "callbacks": [galore()],
        "mutes": True,
        "batching": "padded",
    },
}
REPLICAS = {  # of sides that FSDP2 has not
    "shorter side": {"callbacks": [galore(side="std")]},
    # A gradient in its own bases is a diagonal: Adam would step on the rounding of zeros.
    "both sides": {"callbacks": [galore(side="full")], "optimizer": "sgd"},
}
WINDOW = {"batch": 2, "trainer": {"max_steps": 5, "accumulate_grad_batches": 2}}
REFUSED = {
    ("fsdp", "right"): "FSDP flattens weights into shards",
    (
        "fsdp2",
        "std",
    ): r"projects the rows of 'model.layers.0.self_attn.k_proj' (16 x 32), and ranks",
    ("fsdp2", "full"): r"projects the rows of 'model.layers.0.self_attn.q_proj' (32 x 32)",
}


def keeping(folder, strategy, side="right"):
    kept = {"strategy": strategy, "keep": str(folder / f"{strategy}-{side}")}
    return {**FULL, "trainer": {"max_steps": 3}, "callbacks": [galore(side=side)], **kept}


def going_on(folder, before, after, side="right", was="right"):
    last = folder / f"{before}-{was}" / "last.ckpt"
    goes = {"callbacks": [galore(side=side)], "strategy": after, "resume": str(last)}
    return {**FULL, **goes}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("galore")
    done = Ranks(folder)
    every = {**CASES, **REPLICAS}
    done.single({(name, "single"): {**FULL, **case} for name, case in every.items()})
    for side in ("right", "std"):
        done.single({("kept", "single", side): keeping(folder, "single", side)})
    pairs = [(name, s) for name in CASES for s in SPREAD] + [(name, "ddp") for name in REPLICAS]
    done.pair(
        {
            **{(name, s): {**FULL, **every[name], "strategy": s} for name, s in pairs},
            **{
                ("window", s): {**FULL, "callbacks": [galore()], "strategy": s, **WINDOW}
                for s in SPREAD
            },
            **{
                ("bf16", s): {**FULL, "callbacks": [galore()], "strategy": s, **variant(BF16)}
                for s in SPREAD
            },
            **{
                ("refused", s, side): {**FULL, "callbacks": [galore(side=side)], "strategy": s}
                for s, side in REFUSED
            },
            **{
                ("bytes", name, s): {**FULL, "callbacks": callbacks, "strategy": s, "traffic": True}
                for s in SPREAD
                for name, callbacks in {"galore": [galore()], "full": []}.items()
            },
            **{("kept", s, "right"): keeping(folder, s) for s in SPREAD},
            **{(s, t): going_on(folder, s, t) for s in EVERY for t in SPREAD},
            ("another side",): going_on(folder, "single", "fsdp2", was="std"),
            ("the shorter side",): going_on(folder, "single", "ddp", side="std", was="std"),
        }
    )
    done.single({(s, "single"): going_on(folder, s, "single") for s in EVERY})
    return done


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_project_as_one_does(ranks, name, strategy):
    (expected,) = ranks[name, "single"]
    for found in ranks[name, strategy]:
        assert len(found["loss"]) == 5
        assert_equal_runs(found, expected)


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_project_any_side(ranks, name):
    (expected,) = ranks[name, "single"]
    (right,) = ranks["galore", "single"]
    assert any(not expected["state"][n].allclose(right["state"][n]) for n in right["state"])
    for found in ranks[name, "ddp"]:
        assert_equal_runs(found, expected)


@pytest.mark.parametrize("strategy", SPREAD)
def test_a_window_of_two_ranks_and_two_batches_is_one_of_four_examples(ranks, strategy):
    (expected,) = ranks["galore", "single"]
    for found in ranks["window", strategy]:
        assert_equal_runs(found, expected)


@pytest.mark.parametrize("name", ["galore", "bf16", "rotate", "everything"])
def test_replicas_stay_equal_to_the_bit(ranks, name):
    first, second = ranks[name, "ddp"]
    assert first["loss"] == second["loss"]
    assert all(first["state"][n].equal(second["state"][n]) for n in first["state"])


@pytest.mark.parametrize("strategy", SPREAD)
def test_it_learns_in_bf16(ranks, strategy):
    for found in ranks["bf16", strategy]:
        assert found["loss"][-1] < found["loss"][0] - 0.1
        assert all(t.dtype == torch.bfloat16 for t in found["state"].values())


@pytest.mark.parametrize(("strategy", "side"), REFUSED)
def test_what_cannot_be_is_refused_in_words(ranks, strategy, side):
    for found in ranks.found["refused", strategy, side]:
        assert REFUSED[strategy, side] in found["error"]
        assert "side='right'" in found["error"]


def sizes(state):
    """Elements of the weights that all-linear means, of their projections, and of the rest."""
    linear = [t for n, t in state.items() if n.endswith("proj.weight")]
    projected = sum(t.shape[0] * RANK for t in linear)
    whole = sum(t.numel() for t in linear)
    return linear, projected, sum(t.numel() for t in state.values()) - whole


def test_replicas_exchange_the_low_rank_alone_but_for_refreshes(ranks):
    for found in ranks["bytes", "galore", "ddp"]:
        linear, projected, rest = sizes(found["state"])
        assert len(linear) == 14
        flags = len(linear)
        for step, seen in enumerate(found["traffic"]):
            reduced = [size for kind, size in seen if kind == "allreduce"]
            if step % 2:  # between refreshes: everything of ours in one exchange
                expected = [4 * rest, 4 * (projected + flags)]
            else:
                expected = [4 * rest, 4 * flags, *(t.nbytes for t in linear)]
            assert sorted(reduced) == sorted(expected)
            bases = [size for kind, size in seen if kind == "broadcast" and size >= 4 * RANK * 16]
            assert sum(bases) == (0 if step % 2 else sum(4 * RANK * t.shape[1] for t in linear))
    for found in ranks["bytes", "full", "ddp"]:
        everything = sum(t.nbytes for t in found["state"].values())
        for seen in found["traffic"]:
            assert sum(size for kind, size in seen if kind == "allreduce") == everything


def test_shards_exchange_nothing_more_but_for_refreshes(ranks):
    for rank, found in enumerate(ranks["bytes", "galore", "fsdp2"]):
        linear, *_ = sizes(found["state"])
        full = ranks["bytes", "full", "fsdp2"][rank]["traffic"]
        for step, seen in enumerate(found["traffic"]):
            without = full[step]
            more = seen[len(without) :]
            assert seen[: len(without)] == without
            gathered = sum(size for kind, size in more if kind == "all_gather_into_tensor")
            bases = sum(size for kind, size in more if kind == "broadcast")
            assert gathered == (0 if step % 2 else sum(t.nbytes // 2 for t in linear))
            assert bases == (0 if step % 2 else sum(4 * RANK * t.shape[1] for t in linear))
            assert len(more) == (0 if step % 2 else 2 * len(linear))


@pytest.mark.parametrize("strategy", SPREAD)
def test_moments_are_of_the_low_rank_and_sharded_with_the_weights(ranks, strategy):
    for found in ranks["bytes", "galore", strategy]:
        _, projected, rest = sizes(found["state"])
        counts = 4 * len(found["state"])  # of steps
        moments = found["optimizer_bytes"] - counts
        whole = 2 * 4 * (projected + rest)
        assert moments == (whole if strategy == "ddp" else whole // 2)


@pytest.mark.parametrize("after", EVERY)
@pytest.mark.parametrize("before", EVERY)
def test_a_run_goes_on_inside_a_period_under_any_strategy(ranks, before, after):
    (expected,) = ranks["galore", "single"]
    for found in ranks[before, after]:
        assert len(found["loss"]) == 2
        assert_equal_runs(found, expected)


def test_the_shorter_side_goes_on_where_it_can(ranks):
    (expected,) = ranks["shorter side", "single"]
    for found in ranks["the shorter side",]:
        assert_equal_runs(found, expected)


def test_a_run_of_another_side_is_refused_in_words(ranks):
    for found in ranks.found["another side",]:
        assert "GaLore's subspace of 'model.layers.0.self_attn.k_proj' is {'left'" in found["error"]
        assert "give the same rank and side" in found["error"]


@pytest.mark.parametrize("strategy", EVERY)
def test_a_checkpoint_holds_whole_moments_by_name(ranks, strategy):
    (found, *_) = ranks["kept", strategy, "right"]
    last = ranks.folder / f"{strategy}-right" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["state_dict"].keys() == found["state"].keys()
    (optimizer,) = checkpoint["optimizer_states"]
    for name, weight in found["state"].items():
        if name.endswith("proj.weight"):
            shadow = name.removesuffix("weight") + "galore"
            assert optimizer["state"][shadow]["exp_avg"].shape == (weight.shape[0], RANK)
        else:
            assert optimizer["state"][name]["exp_avg"].shape == weight.shape
    assert len(optimizer["state"]) == len(found["state"])


# ---------------------------------------------------------------- any module

MODULES = {
    "experts": {},
    "experts, coupled": {"galore": {"decay": "coupled", "moments": "rotate"}},
    "another start": {"another_start": True},
    "nothing for DDP": {"bias": False, "another_start": True},
    "infinite at a refresh": {"infinite": 5},  # of rank 1, in the third step
    "by hand": {"manual": True},
    "again without it": {"again": True},
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    done = Ranks(tmp_path_factory.mktemp("modules"))
    folder = {"folder": str(done.folder)}
    for name, case in MODULES.items():
        if not case.get("manual"):  # whose steps no single process makes of two batches
            done.found[name, "single"] = [foreign.run({**folder, **case})]
    cases = {(name, "ddp"): case for name, case in MODULES.items()}
    rounded = {"dtype": "bfloat16", "unseeded": True}
    done.pair({**cases, ("unseeded", "ddp"): rounded}, script=foreign)
    return done


@pytest.mark.parametrize("name", [name for name, case in MODULES.items() if "manual" not in case])
def test_ranks_that_use_different_layers_are_one_that_uses_all(modules, name):
    (expected,) = modules[name, "single"]
    assert any(n.startswith("again.") for n in expected["state"]) == name.startswith("again")
    for found in modules[name, "ddp"]:
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*MODULES, "unseeded"])
def test_ranks_end_with_one_model(modules, name):
    first, second = modules[name, "ddp"]
    assert all(first["state"][n].equal(second["state"][n]) for n in first["state"])
