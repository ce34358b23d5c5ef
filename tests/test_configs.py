"""Every YAML in configs/ parses, alone or over the main one, and says what it means to say."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_adapters.__main__ import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MAIN = CONFIGS / "alpaca_lora.yaml"
METHODS = sorted(p.stem.removeprefix("alpaca_") for p in CONFIGS.glob("alpaca_*.yaml"))
OVERLAYS = sorted(
    p.relative_to(CONFIGS).as_posix()
    for pattern in ("base/*.yaml", "data/*.yaml", "strategy/*.yaml", "metrics.yaml")
    for p in CONFIGS.glob(pattern)
)


def parsed(capsys, *configs: Path, more: tuple[str, ...] = ()) -> dict:
    words = [w for config in configs for w in ("--config", str(config))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", "fit", *words, *more, "--print_config"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def holds(whole: object, part: object) -> bool:
    """Whether everything that ``part`` says is said by ``whole`` too, beside defaults."""
    if isinstance(part, dict):
        return all(holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list) and len(whole) == len(part):
        return all(map(holds, whole, part))
    return whole == part


def test_there_are_overlays():
    bases = {f"base/{name}.yaml" for name in ("llama3_8b", "qwen3_0_6b", "mistral_7b", "tinyllama")}
    assert bases | {"data/alpaca.yaml", "data/gsm8k.yaml"} <= set(OVERLAYS)
    assert {f"strategy/{name}.yaml" for name in ("ddp", "fsdp", "fsdp2")} <= set(OVERLAYS)


def test_every_method_has_a_config_and_the_settings_of_its_paper():
    assert {"dora", "pissa", "lora_ga", "olora", "rslora", "lora_plus"} < set(METHODS)
    assert {"lora", "llama_adapter", "prefix", "full", "milora"} < set(METHODS)
    assert {"galore", "galore_8bit", "qlora", "qpissa"} < set(METHODS)
    assert sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml")) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_config_parses_to_what_it_says(capsys, method):
    config = CONFIGS / f"alpaca_{method}.yaml"
    assert holds(parsed(capsys, config), yaml.safe_load(config.read_text()))


@pytest.mark.parametrize("method", METHODS)
def test_the_paper_s_settings_compose_with_method_and_base(capsys, method):
    stack = [f"alpaca_{method}.yaml", "base/mistral_7b.yaml", f"paper/{method}.yaml"]
    found = parsed(capsys, *(CONFIGS / name for name in stack))
    assert holds(found, yaml.safe_load((CONFIGS / stack[-1]).read_text()))
    own = yaml.safe_load((CONFIGS / stack[0]).read_text())
    assert found["model"]["adapter"]["class_path"] == own["model"]["adapter"]["class_path"]
    assert found["model"]["optimizer"]["class_path"] == own["model"]["optimizer"]["class_path"]
    start = parsed(capsys, CONFIGS / stack[0])["init"]["initialiser"]
    assert found["init"]["initialiser"] == start
    assert found["model"]["base"] == "mistralai/Mistral-7B-v0.3"


@pytest.mark.parametrize("method", METHODS)
def test_configs_differ_in_the_method_and_its_rate_alone(method):
    plain, own = (
        yaml.safe_load((CONFIGS / f"alpaca_{m}.yaml").read_text()) for m in ("lora", method)
    )
    for config in (plain, own):
        config.pop("init", None)
        config["trainer"].pop("default_root_dir")
        config["trainer"].pop("callbacks", None)
        config["model"]["optimizer"].pop("class_path")
        for setting in ("lr", "min_8bit_size"):
            config["model"]["optimizer"]["init_args"].pop(setting, None)
        config["model"].pop("adapter")
        config["model"].pop("lora_plus_ratio", None)
        config["model"].pop("quantization", None)
    assert own == plain


@pytest.mark.parametrize("base", [o for o in OVERLAYS if o.startswith("base/")])
def test_a_base_keeps_the_method_s_optimizer_and_callbacks(capsys, base):
    own = parsed(capsys, CONFIGS / "alpaca_galore_8bit.yaml")
    found = parsed(capsys, CONFIGS / "alpaca_galore_8bit.yaml", CONFIGS / base)
    assert found["model"]["optimizer"]["class_path"] == "bitsandbytes.optim.AdamW8bit"
    assert found["trainer"]["callbacks"] == own["trainer"]["callbacks"]
    assert [c["class_path"] for c in own["trainer"]["callbacks"]] == ["lit_adapters.GaLore"]


def test_a_quantisation_can_be_a_name_or_a_class(capsys):
    for word in ("nf4", "fp4", "int8", "null"):
        found = parsed(capsys, MAIN, more=(f"--model.quantization={word}",))
        assert found["model"]["quantization"] == (None if word == "null" else word)
    settings = ("--model.quantization=lit_adapters.BitsAndBytes", "--model.quantization.kind=fp4")
    found = parsed(capsys, MAIN, more=(*settings, "--model.quantization.storage=bfloat16"))
    chosen = found["model"]["quantization"]
    assert chosen["class_path"] == "lit_adapters.BitsAndBytes"
    assert (chosen["init_args"]["kind"], chosen["init_args"]["storage"]) == ("fp4", "bfloat16")
    assert chosen["init_args"]["double_quant"] is True


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_what_it_names_and_nothing_else(capsys, overlay):
    named = yaml.safe_load((CONFIGS / overlay).read_text())
    plain, laid = parsed(capsys, MAIN), parsed(capsys, MAIN, CONFIGS / overlay)
    assert holds(laid, named)
    assert laid["model"]["adapter"] == plain["model"]["adapter"]
    assert laid["checkpoint"] == plain["checkpoint"]


def test_overlays_compose_and_flags_win(capsys):
    found = parsed(
        capsys,
        MAIN,
        CONFIGS / "base" / "llama3_8b.yaml",
        CONFIGS / "data" / "gsm8k.yaml",
        more=("--model.adapter.rank=32", "--data.batch_size=2"),
    )
    assert found["model"]["base"] == "meta-llama/Llama-3.1-8B"
    assert found["data"]["path"] == "openai/gsm8k:main"
    assert found["data"]["batch_size"] == 2
    assert found["model"]["adapter"]["init_args"]["rank"] == 32
    assert found["trainer"]["accumulate_grad_batches"] == 4


# ---------------------------------------------------------------- what is fitted into memory


def as_a_user(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lit_adapters", "fit", "--config", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("method", ["qlora", "qpissa"])  # GaLore's are tested beside its callback
def test_a_quantised_config_trains_the_embedded_base(tmp_path, method):
    pytest.importorskip("bitsandbytes")
    as_a_user(
        *(CONFIGS / f"alpaca_{method}.yaml", f"--trainer.default_root_dir={tmp_path}"),
        *("--data.train_limit=16", "--trainer.max_epochs=10", "--trainer.log_every_n_steps=1"),
        *("--samples.limit=0", "--trainer.limit_val_batches=1"),
    )
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 20  # of the same sixteen records, ten times
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert list(tmp_path.rglob("checkpoints/last.ckpt"))


def test_an_optimizer_of_bitsandbytes_is_imported_without_noise():
    pytest.importorskip("bitsandbytes")
    done = as_a_user(CONFIGS / "alpaca_galore_8bit.yaml", "--print_config")
    assert "bitsandbytes.optim.AdamW8bit" in done.stdout
    assert done.stderr == ""
