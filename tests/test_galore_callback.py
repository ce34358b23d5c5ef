"""GaLore in Lightning fits: any module, accumulation, clipping, precision, checkpoints, resume."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    FullFineTuning,
    GaLore,
    LoRA,
    load_adapter,
)
from lit_adapters.optim import SHADOW
from tests.models import llama, llama_tied, logits
from tests.test_module import Memory, examples, in_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # Lightning steps the schedule once more than the optimizer when a scaler skips the first step.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

ROOT = Path(__file__).resolve().parents[1]
GALORE = {"rank": 4, "update_gap": 3, "scale": 1.0}


class Rows:
    """Micro-batches of a regression, the same in every epoch; goes on where it was left."""

    def __init__(self, count=24, size=4):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(count * size, 10, generator=generator, dtype=torch.float64)
        y = torch.randn(count * size, 6, generator=generator, dtype=torch.float64)
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Foreign(LightningModule):
    """Somebody's own module: groups by hand, a schedule that knows the last step, no hook."""

    def __init__(self, steps=80, dtype=torch.float64, optimizer=None, infinite_at=None):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 6)]
        self.net = nn.Sequential(*layers).to(dtype)
        self.steps = steps
        self.make = optimizer or (lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-6))
        self.infinite_at = infinite_at
        self.gradients = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        dtype = self.net[0].weight.dtype
        loss = F.mse_loss(self.net(x.to(dtype)).double(), y)
        self.log("loss", loss)
        return loss * (torch.inf if batch_idx == self.infinite_at else 1)

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self.net(batch[0].to(self.net[0].weight.dtype)), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        stepped = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([None if g is None else g.detach().clone() for g in stepped])

    def configure_optimizers(self):
        named = list(self.named_parameters())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0, "lr": 0.003},
        ]
        optimizer = self.make(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.02, 0.005], total_steps=self.steps + 1, cycle_momentum=False
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def make_trainer(folder, *callbacks, **settings):
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": Memory(),
            "log_every_n_steps": 1,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "callbacks": list(callbacks),
            **settings,
        }
    )


def fit(folder, module, *callbacks, data=None, ckpt_path=None, **settings):
    galore = next((c for c in callbacks if isinstance(c, GaLore)), None) or GaLore(**GALORE)
    others = [c for c in callbacks if c is not galore]
    trainer = make_trainer(folder, galore, *others, **settings)
    trainer.fit(module, Rows() if data is None else data, ckpt_path=ckpt_path)
    return trainer, galore


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max((found[n].double() - expected[n].double()).abs().max().item() for n in expected)


# ---------------------------------------------------------------- any module


@pytest.mark.parametrize("clip", ["none", "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_fit_is_the_algorithm_by_hand(tmp_path, accumulate, clip):
    """By hand: full gradients of whole windows, projected afterwards. No engine in sight."""
    clipping = {
        "none": {},
        "norm": {"gradient_clip_val": 0.05},
        "value": {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
    }[clip]
    module, plain = Foreign(24 // accumulate), Foreign(24 // accumulate)
    exact = GaLore(**GALORE, svd="exact")
    trainer, galore = fit(tmp_path, module, exact, accumulate_grad_batches=accumulate, **clipping)
    steps = 24 // accumulate
    assert trainer.global_step == steps  # and not one per micro-batch
    assert {one.steps for one in galore.engine.projected.values()} == {steps}

    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    lows = [
        nn.Parameter(p.new_zeros((p.shape[0], 4) if p.shape[0] >= p.shape[1] else (4, p.shape[1])))
        for p in matrices
    ]
    optimizer = torch.optim.AdamW(
        [{"params": lows}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, eps=1e-6
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.02, 0.005], total_steps=steps + 1, cycle_momentum=False
    )
    batches, bases = Rows().batches, {}
    for number in range(steps):
        plain.zero_grad()
        for x, y in batches[number * accumulate : (number + 1) * accumulate]:
            (F.mse_loss(plain.net(x), y) / accumulate).backward()
        for index, (W, low) in enumerate(zip(matrices, lows, strict=True)):
            if number % 3 == 0:
                U, _, Vh = torch.linalg.svd(W.grad.float(), full_matrices=False)
                bases[index] = Vh[:4].double() if W.shape[0] >= W.shape[1] else U[:, :4].double()
            right = W.shape[0] >= W.shape[1]
            low.grad = W.grad @ bases[index].T if right else bases[index].T @ W.grad
        stepped = [*lows, *vectors]
        if clip == "norm":
            assert nn.utils.clip_grad_norm_(stepped, 0.05) > 0.05
        elif clip == "value":
            nn.utils.clip_grad_value_(stepped, 0.003)
        optimizer.step()
        with torch.no_grad():
            for index, (W, low) in enumerate(zip(matrices, lows, strict=True)):
                W += low @ bases[index] if W.shape[0] >= W.shape[1] else bases[index] @ low
                W *= 1 - optimizer.param_groups[0]["lr"] * 0.1
                low.zero_()
        schedule.step()
    assert distance(weights(module), weights(plain)) < 1e-6
    assert distance(weights(module), weights(Foreign())) > 1e-2
    if clip == "norm":
        norms = [torch.stack([g.norm() for g in step]).norm() for step in module.gradients]
        assert max(norms) <= 0.05 + 1e-6
    if clip == "value":
        assert max(g.abs().max() for step in module.gradients for g in step) <= 0.003


class Weighted(Foreign):
    """Counts a batch by its rows, of which a whole window has 16; a short last window has fewer."""

    def training_step(self, batch, batch_idx):
        divided = self.trainer.accumulate_grad_batches  # by Lightning, in a short window too
        return super().training_step(batch, batch_idx) * len(batch[0]) * divided / 16


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("count", [24, 22])
def test_accumulated_batches_train_like_one_batch(tmp_path, count, clip):
    """Over changes of subspace. With 22 the last window of each epoch is short and steps too."""
    small, large = Rows(count), Rows(count)
    windows = [small.batches[i : i + 4] for i in range(0, count, 4)]
    large.batches = [tuple(torch.cat(part) for part in zip(*w, strict=True)) for w in windows]
    ends = []
    for accumulate, data in ((4, small), (1, large)):
        module = Weighted()
        settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
        trainer, _ = fit(tmp_path, module, data=data, gradient_clip_val=clip, **settings)
        assert trainer.global_step == 12
        norms = [torch.stack([g.norm() for g in step]).norm() for step in module.gradients]
        assert all((norm <= 0.01 + 1e-6) == (clip is not None) for norm in norms)
        ends.append(weights(module))
    assert distance(*ends) < 1e-5
    assert distance(ends[0], weights(Weighted())) > 1e-2


class ByHand(Foreign):
    """Optimises by hand, two micro-batches to a step, clipped."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 0.05)
            optimizer.step()


def test_manual_optimization_steps_and_clips_as_it_says(tmp_path):
    module = ByHand()
    before = weights(module)
    trainer, galore = fit(tmp_path, module)
    assert trainer.global_step == 12
    assert {one.steps for one in galore.engine.projected.values()} == {12}
    assert distance(weights(module), before) > 1e-3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_skipped_at_the_end_of_a_window_does_not_lose_the_window(tmp_path):
    class Skipping(Foreign):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class Half(Foreign):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) / 2

    evens = Rows()
    evens.batches = evens.batches[::2]
    ends = []
    for build, accumulate, data in ((Skipping, 2, Rows()), (Half, 1, evens)):
        module = build()
        settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.01}
        trainer, _ = fit(tmp_path, module, data=data, **settings)
        assert trainer.global_step == 12
        ends.append(weights(module))
    assert distance(*ends) < 1e-9
    assert distance(ends[0], weights(Foreign())) > 1e-2


def test_targets_exclude_and_size_choose_what_is_projected(tmp_path):
    chosen = []
    for how in (
        {"targets": ["net.2"]},
        {"exclude": ["net.0", "net.4"]},
        {"targets": r"net\.[24]", "min_size": 7},
        {"rank": 12},
    ):
        _, galore = fit(tmp_path, Foreign(), GaLore(**{**GALORE, **how}), max_steps=2)
        chosen.append(list(galore.engine.projected))
    assert chosen == [["net.2"]] * 4
    with pytest.raises(ValueError, match="'net.9' matches no module"):
        fit(tmp_path, Foreign(), GaLore(4, targets=["net.9"]))
    with pytest.raises(ValueError, match="none of the 3 weights"):
        fit(tmp_path, Foreign(), GaLore(40))


def test_several_optimizers_are_refused(tmp_path):
    class Two(ByHand):
        def configure_optimizers(self):
            return [
                torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])
            ]

    with pytest.raises(ValueError, match="around one optimizer, and Two configures 2"):
        fit(tmp_path, Two())


def test_an_unsuited_optimizer_is_refused_by_name(tmp_path):
    module = Foreign(optimizer=lambda groups: torch.optim.ASGD(groups))
    with pytest.raises(ValueError, match="cannot project for ASGD"):
        fit(tmp_path, module)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, r"FSDP flattens weights.*Take FSDP2 .*side='right'.*or DDP"),
        (DeepSpeedStrategy, "one device, under DDP and under FSDP2.*under DeepSpeedStrategy; take"),
    ],
)
def test_strategies_that_leave_no_matrix_its_gradient_are_refused_in_words(strategy, message):
    trainer = SimpleNamespace(strategy=object.__new__(strategy), callbacks=[])
    with pytest.raises(ValueError, match=message):
        GaLore(4).setup(trainer, Foreign(), "fit")
    GaLore(4).setup(trainer, Foreign(), "validate")


@pytest.mark.parametrize(
    "average", [StochasticWeightAveraging, EMAWeightAveraging], ids=["swa", "ema"]
)
def test_averages_of_weights_are_refused_in_words(tmp_path, average):
    other = average(0.1) if average is StochasticWeightAveraging else average()
    with pytest.raises(ValueError, match=f"cannot be combined with {average.__name__}"):
        fit(tmp_path, Foreign(), other)


def test_a_second_one_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="several GaLore callbacks.*give one"):
        fit(tmp_path, Foreign(), GaLore(4), GaLore(2))


# ---------------------------------------------------------------- precision


class OnCPU(MixedPrecision):
    """The fp16 plugin with a scaler that works without a GPU; autocast in bf16."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))

    def autocast_context_manager(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("infinite_at", [None, 0, 5, 6])
def test_a_grad_scaler_sees_every_gradient_and_skips_overflows(
    tmp_path, accumulate, clip, infinite_at
):
    module = Foreign(24, dtype=torch.float32, infinite_at=infinite_at)
    plugin = OnCPU()
    _, galore = fit(
        tmp_path,
        module,
        plugins=[plugin],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    done = 24 // accumulate - (infinite_at is not None)
    assert {one.steps for one in galore.engine.projected.values()} == {done}
    assert plugin.scaler.get_scale() == 2.0 ** (8 - (infinite_at is not None))
    assert all(value.isfinite().all() for value in weights(module).values())
    if infinite_at is None:  # and it is the training without a scaler
        plain = Foreign(24, dtype=torch.float32)
        fit(
            tmp_path,
            plain,
            precision="bf16-mixed",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
        )
        assert distance(weights(module), weights(plain)) < 1e-3


class Expert(Foreign):
    """A layer that only the first of two batches uses."""

    def __init__(self):
        super().__init__(dtype=torch.float32)
        self.expert = nn.Linear(10, 10, bias=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.float() if batch_idx % 2 else self.expert(x.float())
        return super().training_step((x, y), batch_idx)


def test_a_grad_scaler_sees_weights_that_the_last_batch_did_not_use(tmp_path):
    ends = []
    for settings in ({"plugins": [OnCPU()]}, {"precision": "bf16-mixed"}):
        module = Expert()
        fit(tmp_path, module, accumulate_grad_batches=2, gradient_clip_val=0.05, **settings)
        ends.append(weights(module))
    assert distance(*ends) < 1e-3
    assert distance(ends[0], weights(Expert())) > 1e-2


def full(base=None, lr=1e-2, optimizer=None, **settings):
    return AdapterFineTuneModule(
        base or llama(),
        settings.pop("adapter", FullFineTuning()),
        optimizer=optimizer or (lambda g: torch.optim.AdamW(g, lr=lr, weight_decay=0.1)),
        **{"lr_scheduler": "constant", "warmup": 0.0, **settings},
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:what is trained is kept in:UserWarning")
def test_it_learns_by_heart_in_every_precision(tmp_path, precision):
    rows = examples(4) * 30
    module = full()
    trainer, galore = fit(
        tmp_path,
        module,
        GaLore(rank=8, update_gap=10),
        data=in_batches(rows, 4),
        precision=precision,
        gradient_clip_val=1.0,
    )
    losses = trainer.logger["train/loss"]
    assert losses[-1] < 0.5 * losses[0]
    half = precision == "bf16-true"
    for one in galore.engine.projected.values():
        assert one.weight.dtype == (torch.bfloat16 if half else torch.float32)
        assert one.shadow.dtype == torch.float32


def test_only_weights_that_are_rounded_to_the_nearest_are_warned_of(tmp_path):
    """Projected ones are rounded stochastically."""
    settings = {"data": in_batches(examples(4), 4), "precision": "bf16-true"}
    fit(tmp_path, full(adapter=FullFineTuning(targets="all-linear")), **settings)
    with pytest.warns(UserWarning, match="kept in torch.bfloat16"):
        fit(tmp_path, full(), **settings)


# ---------------------------------------------------------------- with our module


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.5)


@pytest.mark.parametrize("build", [llama, llama_tied])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_at_full_rank_sgd_is_full_fine_tuning(tmp_path, accumulate, build):
    """So gradients are means over the window's tokens, projected or not, and logged as such."""
    ends, logged = [], []
    galore = GaLore(rank=16, update_gap=2, scale=1.0, targets=["k_proj", "v_proj"])  # 16 x 32
    for callbacks in ([], [galore]):
        module = full(build(), optimizer=sgd)
        settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
        trainer = make_trainer(tmp_path, *callbacks, **settings)
        trainer.fit(module, in_batches(examples(12), 2))
        ends.append(weights(module.model))
        logged.append(trainer.logger["train/grad_norm"] + trainer.logger["train/loss"])
    assert len(galore.engine.projected) == 4
    assert distance(*ends) < 1e-5
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    moved = (ends[0][n] - v for n, v in weights(build()).items() if "k_proj" in n or "v_proj" in n)
    assert all(change.abs().max() > 1e-3 for change in moved)


def test_all_linear_is_every_projection_of_a_model_and_not_its_head(tmp_path):
    _, galore = fit(tmp_path, full(), data=in_batches(examples(2), 2))
    assert {name.rpartition(".")[2] for name in galore.engine.projected} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert len(galore.engine.projected) == 14


def test_gradients_are_means_over_tokens_whatever_the_window(tmp_path):
    ends = []
    for accumulate, size in ((1, 6), (3, 2)):
        module = full(optimizer=sgd)
        rows = examples(12)
        fit(tmp_path, module, data=in_batches(rows, size), accumulate_grad_batches=accumulate)
        ends.append(weights(module.model))
    assert distance(*ends) < 1e-5
    assert distance(ends[0], weights(llama())) > 1e-3


def test_gradient_checkpointing_changes_no_number(tmp_path):
    ends = []
    for recompute in (False, True):
        module = full(gradient_checkpointing=recompute)
        fit(tmp_path, module, data=in_batches(examples(12), 2), accumulate_grad_batches=2)
        ends.append(weights(module.model))
    assert distance(*ends) < 1e-6


def test_an_adapter_s_frozen_base_is_no_use(tmp_path):
    with pytest.raises(ValueError, match=r"is not trained.*adapter=FullFineTuning\(\)"):
        fit(tmp_path, full(adapter=LoRA(rank=2)), data=in_batches(examples(4), 2))


def test_a_part_of_the_base_can_be_trained_and_a_part_of_that_projected(tmp_path):
    module = full(adapter=FullFineTuning(targets=["q_proj", "up_proj", "input_layernorm"]))
    galore = GaLore(rank=4, targets=["q_proj", "k_proj"])
    fit(tmp_path, module, galore, data=in_batches(examples(8), 2))
    assert {n.rpartition(".")[2] for n in galore.engine.projected} == {"q_proj"}
    assert {why for why in galore.engine.ordinary.values()} == {"is not trained"}
    start = weights(llama())
    moved = {n for n, v in weights(module.model).items() if not torch.equal(v, start[n])}
    assert {n.split(".")[-2] for n in moved} == {"q_proj", "up_proj", "input_layernorm"}


def test_optimizer_bytes_are_those_of_the_low_rank(tmp_path):
    sizes = []
    for callbacks in ([], [GaLore(rank=2)]):
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(full(), in_batches(examples(4), 2))
        sizes.append((trainer.logger["bytes/optimizer"][0], trainer.logger["bytes/adapter"][0]))
    projected = callbacks[0].engine.projected.values()
    saved = sum(one.weight.numel() - one.shadow.numel() for one in projected)
    assert sizes[0][0] - sizes[1][0] == 2 * 4 * saved
    assert sizes[0][1] == sizes[1][1]  # shadows are nobody's weights


# ---------------------------------------------------------------- checkpoints


def resumable(
    folder, steps, build=Foreign, ckpt_path=None, callbacks=(), data=None, gap=None, **settings
):
    seed_everything(0, verbose=False)
    module = build()
    checkpoint = AdapterCheckpoint(folder, monitor=None, every_n_train_steps=1000)
    galore = GaLore(**GALORE) if gap is None else GaLore(4, update_gap=gap)
    fit(
        folder,
        module,
        galore,
        checkpoint,
        *callbacks,
        ckpt_path=ckpt_path,
        max_steps=steps,
        max_epochs=4,
        data=data() if data else None,
        **settings,
    )
    return module, galore


def rows_that_go_on():
    from tests.test_checkpoint import Batches

    return Batches(5)


@pytest.mark.filterwarnings("ignore:what is trained is kept in:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_resumed_inside_a_period_ends_to_the_bit_where_an_unbroken_one_does(
    tmp_path, precision
):
    """update_gap is 3; step 4 is inside the second period."""
    settings = {"build": full, "data": rows_that_go_on, "precision": precision}
    whole, galore = resumable(tmp_path / "whole", 8, **settings)
    resumable(tmp_path / "part", 4, **settings)
    file = tmp_path / "part" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    state = saved["callbacks"]["GaLore"]["weights"]
    assert {entry["steps"] for entry in state.values()} == {4}
    assert {entry["age"] for entry in state.values()} == {1}
    assert not any(SHADOW in key for key in saved["state_dict"])
    again, resumed = resumable(tmp_path / "part", 8, ckpt_path=file, **settings)
    assert distance(weights(again), weights(whole)) == 0
    for name, one in resumed.engine.projected.items():
        other = galore.engine.projected[name]
        assert (one.steps, one.age) == (other.steps, other.age) == (8, 2)


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.test_galore_callback import Foreign, resumable, weights
torch.set_num_threads(1)
folder, steps, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if sys.argv[3:] else None
module, _ = resumable(folder, steps, ckpt_path=resume, accumulate_grad_batches=2, gap=5)
torch.save(weights(module), folder / "weights.pt")
"""


def test_a_fresh_process_resumes_to_the_bit(tmp_path):
    def run(folder, *words):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / folder), *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(tmp_path / folder / "weights.pt", weights_only=True)

    whole = run("whole", "20")
    run("part", "12")  # an epoch: the loader has no position to remember
    file = tmp_path / "part" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    assert saved["global_step"] == 12
    assert distance(run("part", "20", str(file)), whole) == 0


def test_a_checkpoint_without_galore_is_refused_and_one_of_another_rank(tmp_path):
    plain = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, plain, max_steps=2)
    trainer.fit(Foreign(), Rows())
    with pytest.raises(ValueError, match="written without GaLore"):
        fit(tmp_path, Foreign(), ckpt_path=plain.last_model_path)
    resumable(tmp_path / "own", 4)
    with pytest.raises(ValueError, match="same rank and side"):
        fit(tmp_path, Foreign(), GaLore(rank=3), ckpt_path=tmp_path / "own" / "last.ckpt")


def test_the_adapter_folder_of_a_run_computes_the_same_on_a_fresh_base(tmp_path):
    """It is written while shadows are on the model."""
    checkpoint = AdapterCheckpoint(tmp_path, monitor=None)
    module = full()
    fit(tmp_path, module, checkpoint, data=in_batches(examples(8), 2))
    fresh = llama()
    load_adapter(fresh, checkpoint.adapter_path)
    assert torch.equal(logits(fresh.eval()), logits(module.model.eval()))
    partly = full(adapter=FullFineTuning(exclude=["embed_tokens"]))  # needs the base it came from
    fit(tmp_path, partly, checkpoint, data=in_batches(examples(8), 2))
    fresh = llama()
    load_adapter(fresh, checkpoint.adapter_path)
    assert torch.equal(logits(fresh.eval()), logits(partly.model.eval()))


def test_a_checkpoint_after_the_fit_holds_the_state_too(tmp_path):
    trainer, galore = fit(tmp_path, Foreign(), max_steps=4)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["GaLore"]
    assert saved["weights"].keys() == galore.engine.projected.keys()


# ---------------------------------------------------------------- the life of a callback


def test_a_model_is_left_as_it_was_and_can_be_fitted_again(tmp_path):
    module, galore = Foreign(), GaLore(**GALORE)
    names = list(weights(module))
    for times in (1, 2):
        before = weights(module)
        fit(tmp_path, module, galore)
        assert list(weights(module)) == names
        assert distance(weights(module), before) > 1e-3
        assert {one.steps for one in galore.engine.projected.values()} == {24}, times
    loss = F.mse_loss(module.net(Rows().batches[0][0]), Rows().batches[0][1])
    module.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_fit_that_failed_inside_a_window_leaves_nothing_behind(tmp_path):
    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("stop")

    ends = []
    for fails in (True, False):
        module, galore = Foreign(), GaLore(**GALORE)
        start = weights(module)
        if fails:
            with pytest.raises(RuntimeError, match="stop"):
                fit(tmp_path, module, galore, Failing(), accumulate_grad_batches=4)
            assert weights(module).keys() == start.keys()
            module.load_state_dict(start)
        fit(tmp_path, module, galore, accumulate_grad_batches=4)
        ends.append(weights(module))
    assert distance(*ends) == 0


def test_it_does_nothing_without_training(tmp_path):
    module, galore = Foreign(), GaLore(**GALORE)
    before = weights(module)
    trainer = make_trainer(tmp_path, galore)
    trainer.validate(module, Rows(), verbose=False)
    trainer.test(module, Rows(), verbose=False)
    assert len(trainer.predict(module, Rows())) == 24
    assert galore.engine is None
    assert distance(weights(module), before) == 0
    fit(tmp_path, module, galore, max_steps=3)
    after = weights(module)
    trainer.validate(module, Rows(), verbose=False)
    assert distance(weights(module), after) == 0


def test_validation_inside_a_window_changes_nothing(tmp_path):
    ends = []
    for validates in (False, True):
        module = Foreign()
        trainer = make_trainer(
            tmp_path,
            GaLore(**GALORE),
            accumulate_grad_batches=4,
            val_check_interval=3,
            limit_val_batches=2 if validates else 0,
        )
        trainer.fit(module, Rows(), Rows())
        ends.append(weights(module))
    assert distance(*ends) == 0


def test_early_stopping_stops_and_the_state_is_of_that_step(tmp_path):
    module, galore = Foreign(), GaLore(**GALORE)
    stop = EarlyStopping("loss", stopping_threshold=100.0, check_on_train_epoch_end=True)
    trainer, _ = fit(tmp_path, module, galore, stop, max_epochs=3)
    assert trainer.global_step == 24
    assert {e["steps"] for e in galore.engine.state_dict()["weights"].values()} == {24}


# ---------------------------------------------------------------- the embedded base


@pytest.mark.parametrize("name", ["galore", "galore_8bit"])
def test_its_config_trains_the_embedded_base_from_the_command_line(tmp_path, name):
    if name == "galore_8bit":
        pytest.importorskip("bitsandbytes")
    from tests.test_methods_in_lightning import last_values, run

    common = [
        *("--config", ROOT / "configs" / f"alpaca_{name}.yaml"),
        f"--trainer.default_root_dir={tmp_path}",
        *("--samples.limit=0", "--trainer.limit_val_batches=4", "--trainer.log_every_n_steps=1"),
    ]
    run("fit", *common, "--trainer.max_steps=30", "--data.train_limit=160")
    first = next(tmp_path.rglob("last.ckpt"))
    assert last_values(tmp_path, "bytes/optimizer") < 3.4e6  # AdamW's: 10,958,048
    learned = last_values(tmp_path, "val/loss")
    run("validate", *common)
    assert learned < 0.95 * last_values(tmp_path, "val/loss")
    run("fit", *common, "--trainer.max_steps=32", "--data.train_limit=160", f"--ckpt_path={first}")
