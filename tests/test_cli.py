"""The command line as a user meets it: one small run, then every command on what it wrote."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_adapters import load_adapter
from lit_adapters.__main__ import TRAINING, USING, importing, main
from lit_adapters.base_model import load_base, resolve_base
from lit_adapters.cli import AdapterCLI
from lit_adapters.data import alpaca_prompt

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "alpaca_lora.yaml"
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"

pytestmark = [
    # torch's own, when a trainer writes TensorBoard files from a process that pytest started
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
]


def run(*arguments: str | Path) -> None:
    """The command line in this process, as if called with these arguments."""
    words = [str(a) for a in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *words])
        main()


def fit_arguments(root: Path, *more: str) -> list[str | Path]:
    small = ["--data.train_limit=96", "--samples.limit=6", "--samples.max_new_tokens=24"]
    quiet = ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=4"]
    return ["fit", "--config", CONFIG, f"--trainer.default_root_dir={root}", *small, *quiet, *more]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A finished `fit`: the folder of its checkpoints."""
    root = tmp_path_factory.mktemp("fit")
    run(*fit_arguments(root))
    (checkpoints,) = root.glob("lightning_logs/version_0/checkpoints")
    return checkpoints


@pytest.fixture(scope="module")
def adapter(fitted):
    return fitted / "adapter"


def test_the_overview_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from lit_adapters.__main__ import main; main(['--help']);"
        "print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in (*TRAINING, *USING):
        assert f"  {command} " in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="fitt.*fit, validate"):
        main(["fitt"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["fit", "--help"], ["fit"]), (["--config=none.yaml", "fit"], list(TRAINING))],
    ids=["command first", "option first"],
)
def test_only_the_parser_of_the_command_is_built(monkeypatch, words, expected):
    built = []
    real = AdapterCLI._prepare_subcommand_parser

    def noted(self, kind, subcommand, **settings):
        built.append(subcommand)
        return real(self, kind, subcommand, **settings)

    monkeypatch.setattr(AdapterCLI, "_prepare_subcommand_parser", noted)
    with pytest.raises(SystemExit):
        run(*words)
    assert built == expected


@pytest.mark.parametrize("was_on", [True, False])
def test_imports_leave_the_garbage_collector_as_it_was(was_on):
    (gc.enable if was_on else gc.disable)()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


def test_garbage_of_an_earlier_run_is_still_found():
    class Node: ...

    node = Node()
    node.itself, gone = node, weakref.ref(node)
    del node
    with importing():
        pass
    gc.collect()
    assert gone() is None


def test_fit_writes_checkpoints_logs_samples_and_the_config(fitted):
    version = fitted.parent
    assert {p.name for p in fitted.iterdir()} == {"adapter", "best.ckpt", "last.ckpt"}
    names = {p.name for p in version.iterdir()}
    assert {"config.yaml", "hparams.yaml", "metrics.csv", "samples.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = [json.loads(line) for line in (version / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert rows[0].keys() == {"task", "prompt", "expected", "before", "after", "match"}


def test_fit_shows_sizes_losses_answers_and_how_to_resume(tmp_path, capsys):
    run(*fit_arguments(tmp_path, "--trainer.max_steps=2"))
    shown = capsys.readouterr().out
    for words in ("trainable parameters", "Before and after", "Exact match", "--ckpt_path"):
        assert words in shown


def test_without_validation_nothing_is_generated(tmp_path, capsys):
    run(*fit_arguments(tmp_path, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"))
    shown = capsys.readouterr().out
    assert "Before and after" not in shown
    assert not list(tmp_path.rglob("samples.jsonl"))
    assert list(tmp_path.rglob("adapter/adapter_model.safetensors"))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(fitted, tmp_path, command, capsys):
    run(
        command, "--config", CONFIG, f"--ckpt_path={fitted / 'best.ckpt'}", "--samples.limit=3",
        "--trainer.limit_test_batches=2", "--trainer.limit_val_batches=2",
        f"--trainer.default_root_dir={tmp_path}", "--samples.max_new_tokens=8",
    )  # fmt: skip
    shown = capsys.readouterr().out
    stage = {"validate": "val", "test": "test"}[command]
    for name in ("loss", "perplexity", "token_accuracy"):
        assert f"{stage}/{name}" in shown


def test_predictions_are_written_in_order_with_prompt_and_reference(fitted, tmp_path):
    file = tmp_path / "answers.jsonl"
    run(
        "predict", "--config", CONFIG, f"--ckpt_path={fitted / 'best.ckpt'}",
        "--trainer.limit_predict_batches=2", f"--trainer.default_root_dir={tmp_path}",
        "--model.max_new_tokens=8", f"--predictions.path={file}",
    )  # fmt: skip
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 16
    keys = ["index", "task", "prompt", "reference", "prediction", "metrics"]
    assert all(list(row) == keys for row in rows)
    test_file = ROOT / "lit_adapters" / "assets" / "tasks" / "test.jsonl"
    records = [json.loads(line) for line in test_file.read_text().splitlines()]
    assert [row["reference"] for row in rows] == [r["output"] for r in records[:16]]


def test_a_folder_in_the_place_of_the_predictions_is_refused_before_any_is_made(tmp_path, capsys):
    with pytest.raises(ValueError, match="a folder; name a file in it"):
        run("predict", "--config", CONFIG, "--model.max_new_tokens=1",
            "--trainer.limit_predict_batches=1", f"--predictions.path={tmp_path}")  # fmt: skip
    assert "predictions written" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_metrics_are_named_once_for_every_command(fitted, tmp_path, capsys):
    common = (
        "--config", CONFIG, f"--ckpt_path={fitted / 'best.ckpt'}", "--metrics+=NumericAnswer",
        "--metrics+=lit_adapters.metrics.BLEU", "--metrics.tokenize=char",
        f"--trainer.default_root_dir={tmp_path}",
    )  # fmt: skip
    scores = tmp_path / "scores.json"
    run(
        "test", *common, "--samples.limit=6", "--samples.max_new_tokens=8",
        "--trainer.limit_test_batches=1", f"--samples.scores_file={scores}",
    )  # fmt: skip
    found = json.loads(scores.read_text())["answers"]
    assert found["arithmetic"].keys() == {"exact_match", "numeric", "bleu"}
    assert found["sql"].keys() == {"exact_match", "bleu"}
    run("predict", *common, "--trainer.limit_predict_batches=2", "--model.max_new_tokens=8")
    rows = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    assert all({"exact_match", "bleu"} <= row["metrics"].keys() for row in rows)
    assert "bleu" in capsys.readouterr().out


def greedy(model, prompt, tokens=12):
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("tiny"))
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def with_adapter(adapter):
    model = load_base("tiny")
    load_adapter(model, adapter)
    return model


PROMPT = "Write the meaning of the text as a function call."
INPUT = "Blue Lamp serves Thai food."


def test_generate_answers_a_prompt_with_the_adapter(adapter, capsys):
    run(
        "generate", "--adapter", adapter, "--prompt", PROMPT, "--input", INPUT,
        "--max_new_tokens=12",
    )  # fmt: skip
    expected = greedy(with_adapter(adapter), alpaca_prompt(PROMPT, INPUT))
    assert capsys.readouterr().out.strip() == expected.strip()


def test_generate_asks_as_a_template_file_and_a_task_prompt_trained(tmp_path, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run(
        "generate", "--prompt", PROMPT, "--input", INPUT, "--max_new_tokens=12",
        "--template", template, "--task_prompt", "Be brief.",
    )  # fmt: skip
    prompt = f"system: Be brief.<|eos|>user: {PROMPT}\n\n{INPUT}<|eos|>assistant: "
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("tiny"))
    assert tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id  # once, of the tokenizer
    expected = greedy(load_base("tiny"), prompt)
    assert capsys.readouterr().out.strip() == expected.strip()
    run("generate", "--prompt", PROMPT, "--task_prompt", "Be brief.", "--max_new_tokens=12")
    expected = greedy(load_base("tiny"), f"Be brief.\n\n{alpaca_prompt(PROMPT)}")
    assert capsys.readouterr().out.strip() == expected.strip()
    with pytest.raises(ValueError, match="--raw takes prompts as they are"):
        run("generate", "--prompt", PROMPT, "--raw", "--task_prompt", "Be brief.")


@pytest.mark.parametrize("switch", [["--json"], ["--json", "true"], ["--json=true"]])
def test_generate_answers_every_line_of_a_file_as_json(adapter, tmp_path, capsys, switch):
    file = tmp_path / "questions.jsonl"
    lines = [{"instruction": PROMPT, "input": INPUT}, {"instruction": PROMPT}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    run("generate", "--adapter", adapter, *switch, "--file", file, "--max_new_tokens=4")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["instruction"], row["input"]) for row in rows] == [(PROMPT, INPUT), (PROMPT, "")]


def test_generate_reads_prompts_from_a_pipe():
    done = subprocess.run(
        [sys.executable, "-m", "lit_adapters", "generate", "--raw=true", "--max_new_tokens=3"],
        input="The function returns\nIf you\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert len(done.stdout.strip().splitlines()) >= 2


def test_a_broken_line_of_a_prompt_file_is_named(adapter, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"instruction": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match="line 2.*instruction"):
        run("generate", "--adapter", adapter, "--file", file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.txt", None, "nowhere.txt cannot be read: .*No such file.*one instruction per l"),
        ("latin.txt", b"caf\xe9", "latin.txt cannot be read: .*0xe9.*text in UTF-8"),
        ("empty.txt", b"\n\n", "empty.txt holds no instruction"),
        ("number.jsonl", b'{"instruction": 5}', "line 1: expected .*texts 'instruction'"),
        ("deep.jsonl", b'{"instruction": "a", "input": ["b"]}', "line 1: expected .*'input'"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_named(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run("generate", f"--file={tmp_path / name}", "--base=./nowhere")  # which is not looked at


def test_a_prompt_file_may_begin_with_windows_mark(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"instruction": "Say yes."}\n')
    run("generate", f"--file={file}", "--max_new_tokens=2", "--json=true")
    assert json.loads(capsys.readouterr().out)["instruction"] == "Say yes."


def test_an_output_that_would_mix_a_model_with_an_adapter_is_refused(adapter, tmp_path):
    """transformers applies an adapter that lies beside a model: here, to one that has it merged."""
    (tmp_path / "file").touch()
    (tmp_path / "config.json").touch()
    before = sorted(file.name for file in adapter.iterdir())
    for command, output, words in [
        ("merge", adapter, "holds adapter_config.json.*choose another folder"),
        ("export", tmp_path, "holds config.json.*choose another folder"),
        ("merge", tmp_path / "file", "file' is no folder"),
        ("export", tmp_path / "file", "file' is no folder"),
        ("merge", "", "'' is no folder"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(command, f"--adapter={adapter}", f"--output={output}")
    assert sorted(file.name for file in adapter.iterdir()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "file"]


def test_a_base_or_tokenizer_that_is_an_adapter_folder_is_told_so(adapter):
    with pytest.raises(FileNotFoundError, match="without config.json; it is an adapter folder"):
        run("generate", f"--base={adapter}", "--prompt=a")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer .*name a folder or hub id"):
        run("generate", f"--tokenizer={adapter}", "--prompt=a")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_a_stock_model_of_the_same_answers(adapter, tmp_path, dtype):
    run("merge", "--adapter", adapter, "--output", tmp_path / "merged", f"--dtype={dtype}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    assert merged.state_dict().keys() == load_base("tiny").state_dict().keys()
    prompt = alpaca_prompt(PROMPT, INPUT)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(prompt, return_tensors="pt")
    ours = with_adapter(adapter)
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    with torch.no_grad():
        found, expected = merged.float()(**ids).logits, ours(**ids).logits
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance


def test_a_merged_folder_is_a_base_like_any_other(adapter, tmp_path, capsys):
    run("export", "--adapter", adapter, "--output", tmp_path / "hf", "--format=hf")
    capsys.readouterr()
    run("generate", "--base", tmp_path / "hf", "--prompt", PROMPT, "--input", INPUT,
        "--max_new_tokens=12")  # fmt: skip
    expected = greedy(with_adapter(adapter), alpaca_prompt(PROMPT, INPUT))
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_exported_folder_loads_in_peft_to_the_same_logits(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    run("export", "--adapter", adapter, "--output", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(load_base("tiny"), tmp_path / "peft").eval()
    ours = with_adapter(adapter)
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-6


def test_an_unknown_option_is_refused_by_name(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(*fit_arguments(tmp_path, "--model.adapter.rnk=4"))
    assert "rnk" in capsys.readouterr().err


@pytest.mark.skipif(not STORIES.exists(), reason="needs the shared pretrained model")
def test_the_same_command_runs_on_a_real_model_and_real_records(tmp_path):
    run(
        "fit", "--config", CONFIG, f"--model.base={STORIES}", f"--data.path={ALPACA}",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=24", "--samples.limit=4",
        "--samples.max_new_tokens=16", "--trainer.log_every_n_steps=1", "--data.max_length=256",
        "--trainer.limit_val_batches=4",
    )  # fmt: skip
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *lines = metrics.read_text().splitlines()
    column = header.split(",").index("train/loss")
    losses = [float(v) for line in lines if (v := line.split(",")[column])]
    assert len(losses) == 24
    assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.1
    model = load_base(str(STORIES))
    (folder,) = tmp_path.rglob("adapter")
    load_adapter(model, folder)
