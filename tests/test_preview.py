"""`data preview`: what it shows is what is trained on."""

import json
import sys
from pathlib import Path

import pytest

from lit_adapters.__main__ import main
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.preview import TRAINED, coloured, described, show
from tests.data.chat_templates import chat_tokenizer
from tests.data.word_tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
PAIRS = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e f g h"}]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(PAIRS))
    return InstructionDataModule(str(file), tokenizer=word_tokenizer(), val_size=0, max_length=6)


def test_pieces_are_the_text_in_the_order_of_the_ids(data):
    (record,) = [described(data.tokenizer, tokens) for tokens in data.tokens("train")[:1]]
    assert (record["tokens"], record["trained"]) == (5, 2)
    assert "".join(piece["text"] for piece in record["pieces"]) == "<s> a b c </s>"
    assert [(piece["text"].strip(), piece["trained"]) for piece in record["pieces"]] == [
        ("<s> a b", False),
        ("c </s>", True),
    ]
    assert [i for piece in record["pieces"] for i in piece["ids"]] == data.tokens("train")[0][
        "input_ids"
    ]


def test_trained_tokens_are_coloured_and_special_ones_stand_out(data):
    record = described(data.tokenizer, data.tokens("train")[0])
    text = coloured(record["pieces"], data.tokenizer.all_special_tokens)
    assert text.plain == "<s> a b c </s>"
    styles = {(text.plain[s.start : s.end].strip(), str(s.style)) for s in text.spans}
    assert {("c </s>", TRAINED), ("<s>", "reverse"), ("</s>", "reverse")} <= styles


def test_a_conversation_shows_every_trained_turn(tmp_path, capsys):
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(record))
    data = InstructionDataModule(str(file), tokenizer=chat_tokenizer(), val_size=0)
    show(data, "train", 5, as_json=True)
    (found,) = json.loads(capsys.readouterr().out)["records"]
    trained = [piece["text"] for piece in found["pieces"] if piece["trained"]]
    assert trained == ["1<|im_end|>", "2<|im_end|>"]


def test_the_screen_shows_records_and_statistics(data, capsys):
    show(data, "train", 1, as_json=False)
    shown = capsys.readouterr().out
    assert "train 1: 5 tokens, 2 trained on" in shown
    assert "train 2" not in shown
    assert "<s> a b c </s>" in shown
    assert "truncated share │ 50.0%" in shown


def test_a_split_of_several_sources_has_statistics_of_each(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(PAIRS * 2))
    settings = {"tokenizer": word_tokenizer(), "val_size": 2, "max_length": 6}
    data = InstructionDataModule(list(map(str, files)), **settings)
    show(data, "validation", 9, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [record["source"] for record in found["records"]] == ["a", "b"]
    assert {name: one["examples"] for name, one in found["statistics"].items()} == {
        "validation/a": 1,
        "validation/b": 1,
    }
    show(data, "validation", 1, as_json=False)
    shown = capsys.readouterr().out
    assert "validation 1 of a: " in shown
    assert "validation/a" in shown
    assert "validation/b" in shown
    show(data, "train", 1, as_json=True)
    assert json.loads(capsys.readouterr().out)["statistics"]["examples"] == 6


def test_nothing_to_show_is_said(data):
    with pytest.raises(ValueError, match="--records 0 shows nothing"):
        show(data, "train", 0, as_json=False)
    with pytest.raises(ValueError, match="there is no validation split to show; raise val_size"):
        show(data, "validation", 1, as_json=False)


def test_the_command_takes_the_options_of_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "alpaca_lora.yaml"
    words = ["data", "preview", "--config", str(config), "--data.train_limit=3", "--json"]
    monkeypatch.setattr(sys, "argv", ["lit_adapters", *words])
    main(words)
    found = json.loads(capsys.readouterr().out)
    assert found["statistics"]["examples"] == len(found["records"]) == 3
    for record in found["records"]:
        read, written = record["pieces"]
        assert (read["trained"], written["trained"]) == (False, True)
        assert read["text"].startswith("<|bos|>Below is")
        assert written["text"].endswith("<|eos|>")
    assert not any(tmp_path.iterdir())  # no run was begun


def test_an_unknown_thing_to_do_with_data_is_wrong_usage():
    for words in (["data"], ["data", "show"]):
        with pytest.raises(SystemExit, match="usage: python -m lit_adapters data preview"):
            main(words)
