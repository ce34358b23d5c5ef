"""Every YAML in configs/ parses, alone or over the main one, and says what it means to say."""

import sys
from pathlib import Path

import pytest
import yaml

from lit_adapters.__main__ import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MAIN = CONFIGS / "alpaca_lora.yaml"
OVERLAYS = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.yaml"))


def parsed(capsys, *configs: Path, more: tuple[str, ...] = ()) -> dict:
    words = [w for config in configs for w in ("--config", str(config))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", "fit", *words, *more, "--print_config"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def holds(whole: dict, part: dict) -> bool:
    return all(
        holds(whole[key], value) if isinstance(value, dict) else whole[key] == value
        for key, value in part.items()
    )


def test_there_are_overlays():
    bases = {f"base/{name}.yaml" for name in ("llama3_8b", "qwen3_0_6b", "mistral_7b", "tinyllama")}
    assert bases | {"data/alpaca.yaml", "data/gsm8k.yaml"} <= set(OVERLAYS)


def test_the_main_config_parses_to_what_it_says(capsys):
    assert holds(parsed(capsys, MAIN), yaml.safe_load(MAIN.read_text()))


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
