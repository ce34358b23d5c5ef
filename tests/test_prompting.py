"""A folder and a checkpoint say how the adapter was asked; what loads them asks the same way."""

import json

import peft
import pytest
import torch
from lightning.pytorch import Trainer

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    InstructionDataModule,
    LoRA,
    commands,
    load_adapter,
    save_adapter,
)
from lit_adapters.base_model import load_base
from lit_adapters.data import Prompting, alpaca_prompt
from lit_adapters.prompting import prompting_of
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama
from tests.test_cli import run

JINJA = "{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }}{% endfor %}"
JINJA += "{% if add_generation_prompt %}assistant : {% endif %}"
RECORDS = [{"instruction": f"a {a}", "output": a, "input": ""} for a in "bcdefghijkl"]
TURNS = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]}
    for a in "bcdefghijkl"
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = word_tokenizer()
    llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_of(folder, records=RECORDS, **settings):
    folder.mkdir(exist_ok=True)
    file = folder / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return InstructionDataModule(str(file), val_size=3, batch_size=4, **settings)


def trainer_of(folder, **settings):
    return Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        callbacks=[AdapterCheckpoint(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(folder, base, records=RECORDS, **settings):
    """Train one step; return the module."""
    torch.manual_seed(0)
    module = AdapterFineTuneModule(str(base), LoRA(rank=2), max_new_tokens=2)
    trainer_of(folder).fit(module, data_of(folder, records, **settings))
    return module


def noted(folder):
    return json.loads((folder / "adapter" / "lit_adapters.json").read_text())["prompting"]


def loaded(folder, base):
    """A module around a base with the adapter of this folder."""
    model = load_base(str(base))
    load_adapter(model, folder / "adapter")
    return AdapterFineTuneModule(model, tokenizer=word_tokenizer(), max_new_tokens=2)


@pytest.fixture
def own_template(tmp_path, base):
    """An adapter of a template file that is gone, and of a task description."""
    file = tmp_path / "mine.jinja"
    file.write_text(JINJA)
    fit(tmp_path, base, template=str(file), task_prompt="be brief")
    file.unlink()
    return tmp_path


def asked(monkeypatch, *options):
    """The prompts that `generate` asks with these options."""
    found = []

    def answers(model, tokenizer, ids, *_, **__):
        found.extend(tokenizer.batch_decode(ids))
        return [""] * len(ids)

    monkeypatch.setattr(commands, "generate_answers", answers)
    run("generate", *options)
    return found


def notes(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(
    ("records", "settings", "template"),
    [
        (RECORDS, {}, "alpaca"),
        (RECORDS, {"template": "none"}, "none"),
        (TURNS, {}, "alpaca"),  # the tokenizer has no chat template
        ([{"prompt": a, "completion": a} for a in "bcdefghij"], {}, "none"),
    ],
)
def test_a_folder_states_what_auto_meant(tmp_path, base, records, settings, template):
    fit(tmp_path, base, records, **settings)
    assert noted(tmp_path) == {"template": template, "task_prompt": ""}


def test_sources_that_were_asked_differently_leave_it_to_the_format(tmp_path, base):
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"prompt": a, "completion": a}) for a in "bcdefghij"))
    data_of(tmp_path)
    data = InstructionDataModule([str(tmp_path / "records.jsonl"), str(others)], val_size=2)
    trainer_of(tmp_path).fit(AdapterFineTuneModule(str(base), LoRA(rank=2)), data)
    assert noted(tmp_path)["template"] == "auto"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_template_file_is_kept_as_its_text_and_peft_reads_the_folder(own_template, base):
    assert noted(own_template) == {"template": JINJA, "task_prompt": "be brief"}
    for file in (own_template / "adapter").iterdir():
        assert b"mine.jinja" not in file.read_bytes()
    model = llama(vocab_size=len(word_tokenizer()), max_position_embeddings=512)
    peft.PeftModel.from_pretrained(model, own_template / "adapter")


def test_generate_asks_as_training_did(own_template, base, monkeypatch, capsys):
    command = ["--base", base, "--adapter", own_template / "adapter", "--prompt", "a b"]
    [found] = asked(monkeypatch, *command)
    tokenizer = word_tokenizer()
    ids = tokenizer("system : be brief </s> user : a b </s> assistant :", add_special_tokens=False)
    assert found == tokenizer.decode(ids["input_ids"])
    assert notes(capsys) == []


def test_what_is_given_to_generate_wins_and_a_difference_is_said(
    own_template, base, monkeypatch, capsys
):
    command = ["--base", base, "--adapter", own_template / "adapter", "--prompt", "a b"]
    [found] = asked(monkeypatch, *command, "--template", "none", "--task_prompt", "")
    assert found == "<s> a b"
    (said,) = notes(capsys)
    assert "template 'none' is not that of the adapter's training, '{% for m in" in said
    assert "task_prompt '' is not that of the adapter's training, 'be brief'" in said
    same = own_template / "same.jinja"
    same.write_text(JINJA)
    asked(monkeypatch, *command, "--template", same, "--task_prompt", "be brief")
    assert notes(capsys) == []
    assert asked(monkeypatch, *command, "--raw") == ["<s> a b"]


def test_without_a_record_generate_takes_the_alpaca_template(base, monkeypatch, tmp_path):
    tokenizer = word_tokenizer()
    expected = tokenizer.decode(tokenizer(alpaca_prompt("a b"))["input_ids"])
    assert asked(monkeypatch, "--base", base, "--prompt", "a b") == [expected]
    fit(tmp_path, base, template="none")
    extra = tmp_path / "adapter" / "lit_adapters.json"
    notes = json.loads(extra.read_text())
    del notes["prompting"]  # as folders of earlier versions
    extra.write_text(json.dumps(notes))
    command = ["--base", base, "--adapter", tmp_path / "adapter", "--prompt", "a b"]
    assert asked(monkeypatch, *command) == [expected]


def test_a_loaded_adapter_is_predicted_and_saved_again_as_it_was_trained(own_template, base):
    module, data = loaded(own_template, base), data_of(own_template)
    rows = trainer_of(own_template).predict(module, data)
    assert all(row["prompt"].startswith("system : be brief") for batch in rows for row in batch)
    save_adapter(module.model, own_template / "again")
    extra = json.loads((own_template / "again" / "lit_adapters.json").read_text())
    assert extra["prompting"] == noted(own_template)


def test_the_next_adapter_is_asked_in_its_own_way(own_template, base, tmp_path):
    fit(tmp_path / "other", base, template="none")
    data, starts = data_of(own_template), []
    modules = [loaded(own_template, base), loaded(tmp_path / "other", base)]
    unknown = AdapterFineTuneModule(str(base), LoRA(rank=2), max_new_tokens=2)
    for module in [*modules, unknown]:
        rows = trainer_of(own_template).predict(module, data)
        starts.append(rows[0][0]["prompt"].split()[0])
    assert starts == ["system", "a", "Below"]


def test_an_adapter_that_is_loaded_after_a_fit_is_asked_in_its_own_way(
    own_template, base, tmp_path
):
    data, trainer = data_of(tmp_path / "data"), trainer_of(tmp_path / "fitted")
    fitted = AdapterFineTuneModule(str(base), LoRA(rank=2), max_new_tokens=2)
    trainer.fit(fitted, data)
    starts = []
    for module in (fitted, loaded(own_template, base), fitted):
        rows = trainer_of(tmp_path / "fitted").predict(module, data)
        starts.append(rows[0][0]["prompt"].split()[0])
    assert starts == ["Below", "system", "Below"]


@pytest.mark.parametrize("given", [{"template": "alpaca"}, {"task_prompt": "say it"}])
def test_what_is_given_to_the_data_module_wins_and_is_said_once(own_template, base, given, caplog):
    module, data = loaded(own_template, base), data_of(own_template, **given)
    with caplog.at_level("INFO"):
        trainer_of(own_template).predict(module, data)
    said = [r.getMessage() for r in caplog.records if "not that of the adapter" in r.getMessage()]
    assert len(said) == 1
    recorded = Prompting(JINJA, "be brief", "all")
    assert data.corpus.prompting == Prompting(
        given.get("template", recorded.template), given.get("task_prompt", recorded.task_prompt)
    )


@pytest.mark.parametrize("command", ["predict", "test", "validate"])
def test_a_checkpoint_is_evaluated_as_it_was_trained(own_template, base, command):
    expected = fit(own_template / command, base, template=JINJA, task_prompt="be brief")
    module, data = AdapterFineTuneModule(str(base), LoRA(rank=2)), data_of(own_template)
    trainer = trainer_of(own_template)
    getattr(trainer, command)(module, data, ckpt_path=str(own_template / command / "last.ckpt"))
    assert prompting_of(module.model) == prompting_of(expected.model)
    split = "validation" if command == "validate" else "test"
    assert data.examples(split)[0].prompt.startswith("system : be brief")
    if command != "predict":
        ids = data.tokens(split)[0]["input_ids"]
        assert "</s>" in module.tokenizer.convert_ids_to_tokens(ids[:-1])  # between the turns


def test_training_again_states_its_own(own_template, base):
    module = loaded(own_template, base)
    trainer_of(own_template).fit(module, data_of(own_template, template="none", task_prompt=""))
    assert noted(own_template) == {"template": "none", "task_prompt": ""}


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"template": "/etc/passwd.jinja"}, "must be the text of a template .* not followed"),
        ({"template": "../secret.j2"}, "not followed"),
        ({"template": "chatml"}, "template 'chatml' is unknown"),
        ({"template": ["alpaca"]}, "'template' must be a text"),
        ({"template": "alpaca", "task_prompt": 3}, "'task_prompt' must be a text"),
        ({"template": "{{ messages }}" * 10_000}, "each may have 100000 at most"),
        ("alpaca", "must be an object"),
    ],
)
def test_what_a_folder_says_is_not_trusted(own_template, note, message):
    extra = own_template / "adapter" / "lit_adapters.json"
    extra.write_text(json.dumps({**json.loads(extra.read_text()), "prompting": note}))
    model = llama(vocab_size=len(word_tokenizer()), max_position_embeddings=512)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(model, own_template / "adapter")
    assert "lit_adapters.json" in str(raised.value)
    assert len(str(raised.value)) < 1500
    assert prompting_of(model) is None


def test_a_recorded_template_runs_in_a_sandbox(own_template, base, monkeypatch):
    extra = own_template / "adapter" / "lit_adapters.json"
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    note = {"template": escape, "task_prompt": ""}
    extra.write_text(json.dumps({**json.loads(extra.read_text()), "prompting": note}))
    command = ["--base", base, "--adapter", own_template / "adapter", "--prompt", "a b"]
    with pytest.raises(ValueError, match="unsafe"):
        asked(monkeypatch, *command)
