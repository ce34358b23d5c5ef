"""Answers do not depend on how prompts are batched, cached or padded; exact match of answers."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_adapters import LoRA, attach
from lit_adapters.data import Example, collate, tokenise
from lit_adapters.generation import answer, generate, generate_from_ids
from lit_adapters.metrics import Score, exact_match, matches
from tests.data.word_tokenizer import BOS, EOS, word_tokenizer
from tests.models import gemma, gpt2, llama, mistral, qwen2, shake

PROMPTS = ["a b c d e f g h i", "k", "x y z", "b a", "m n o p q r", "k"]
TOKENIZER = word_tokenizer()
VOCAB = len(TOKENIZER)


def adapted(build=llama, **changes):
    model = build(vocab_size=VOCAB, **changes)
    attach(model, LoRA(rank=4, dropout=0.5))
    return shake(model)


def greedy(model, tokenizer, prompt, max_new_tokens):
    """The reference: one prompt, no cache, no padding; the whole sequence again for each token."""
    ids = tokenizer(prompt)["input_ids"]
    made = []
    model.eval()
    with torch.no_grad():
        for _ in range(max_new_tokens):
            scores = model(input_ids=torch.tensor([ids + made]), use_cache=False).logits
            made.append(int(scores[0, -1].argmax()))
            if made[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("build", [llama, gpt2, qwen2, mistral, gemma])
def test_batched_and_cached_answers_equal_uncached_ones_one_by_one(build):
    model = adapted(build)
    expected = [greedy(model, TOKENIZER, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) > 3
    for batch_size in (1, 2, 64):
        assert generate(model, TOKENIZER, PROMPTS, 8, batch_size=batch_size) == expected


def test_an_answer_ends_at_the_end_of_sequence_token():
    """One row of a batch stops early; what follows it there is not part of its answer."""
    model = adapted()
    longest = [greedy(model, TOKENIZER, prompt, 12).split() for prompt in PROMPTS]
    stop = next(word for words in longest for word in words[2:5] if word not in words[:2])
    tokenizer = word_tokenizer()
    tokenizer.eos_token = stop
    expected = [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert min(len(text.split()) for text in expected) < 6
    assert max(len(text.split()) for text in expected) > 6
    assert generate(model, tokenizer, PROMPTS, 12) == expected


def test_every_end_of_sequence_token_of_the_model_ends_an_answer():
    model = adapted()
    words = greedy(model, TOKENIZER, "k", 8).split()
    stop = TOKENIZER.convert_tokens_to_ids(words[3])
    model.generation_config.eos_token_id = [EOS, stop]
    found = generate(model, TOKENIZER, ["k"], 8)[0].split()
    assert [w for w in found if w != words[3]] == words[: words.index(words[3])]


@pytest.mark.parametrize(
    "habits",
    [
        {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 20},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"max_length": 3},
    ],
    ids=lambda habits: next(iter(habits)),
)
def test_temperature_zero_is_greedy_whatever_the_model_recommends(habits):
    """Chat models ship a generation_config.json that samples; scores must not depend on it."""
    model = adapted()
    expected = [greedy(model, TOKENIZER, prompt, 6) for prompt in PROMPTS]
    for key, value in habits.items():
        setattr(model.generation_config, key, value)
    torch.manual_seed(1)
    assert generate(model, TOKENIZER, PROMPTS, 6) == expected


def test_temperature_samples_and_follows_the_seed():
    model = adapted()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, TOKENIZER, PROMPTS, 8, temperature=3.0))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != generate(model, TOKENIZER, PROMPTS, 8)


def test_greedy_answers_leave_the_random_state_alone():
    model = adapted()
    before = torch.get_rng_state()
    generate(model, TOKENIZER, PROMPTS, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_even_after_an_error(fails):
    model = adapted()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert {True, False} == set(before)
    if fails:
        model.generate = None
        with pytest.raises(TypeError):
            generate(model, TOKENIZER, ["a"], 2)
    else:
        generate(model, TOKENIZER, ["a"], 2)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_while_answering():
    model = adapted()
    expected = generate(model.eval(), TOKENIZER, PROMPTS, 6)
    assert generate(model.train(), TOKENIZER, PROMPTS, 6) == expected


def test_gradient_checkpointing_does_not_change_answers():
    model = adapted()
    expected = generate(model, TOKENIZER, PROMPTS, 6)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert generate(model.train(), TOKENIZER, PROMPTS, 6) == expected


def test_progress_counts_every_prompt():
    counts = []
    generate(adapted(), TOKENIZER, PROMPTS, 2, batch_size=4, progress=counts.append)
    assert counts == [4, 2]


def test_no_prompts_give_no_answers():
    assert generate(adapted(), TOKENIZER, [], 2) == []


@pytest.mark.parametrize("pad", [True, False])
def test_a_tokenizer_without_padding_token_will_do(pad):
    model = adapted()
    tokenizer = word_tokenizer(pad=pad)
    expected = [greedy(model, tokenizer, prompt, 4) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 4) == expected


@pytest.mark.parametrize(
    ("options", "prompt"),
    [({}, "a b"), ({"bos": False}, "a b"), ({"suffix": True}, "a b"), ({}, "<s> a b")],
    ids=["bos", "no-bos", "appends-eos", "bos-in-prompt"],
)
def test_generation_starts_from_the_prompt_ids_of_training(options, prompt):
    """No EOS at the end of a prompt, and no second BOS: the model has never seen either."""
    tokenizer = word_tokenizer(**options)
    (tokens,), _ = tokenise([Example(prompt, "c")], tokenizer)
    seen = []
    model = adapted()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generate(model, tokenizer, [prompt], 1)
    pairs = zip(tokens["input_ids"], tokens["labels"], strict=True)
    trained_on = [i for i, label in pairs if label == -100]
    assert seen[0] == trained_on
    assert seen[0].count(BOS) <= 1


# --- answers to labelled batches -----------------------------------------------------------------


def labelled(pairs, tokenizer: PreTrainedTokenizerFast = TOKENIZER):
    tokens, _ = tokenise([Example(prompt, response) for prompt, response in pairs], tokenizer)
    return collate(tokens, tokenizer.pad_token_id)


def test_answer_takes_the_untrained_head_of_every_row():
    pairs = [("a b c d", "e f"), ("k", "l m n o p"), ("x y", "z")]
    model = adapted()
    found = answer(model, TOKENIZER, labelled(pairs), 5)
    assert [row["prompt"] for row in found] == [prompt for prompt, _ in pairs]
    assert [row["reference"] for row in found] == [response for _, response in pairs]
    assert [row["prediction"] for row in found] == [
        greedy(model, TOKENIZER, prompt, 5) for prompt, _ in pairs
    ]


def test_an_answer_ends_at_other_tokens_that_are_named():
    model = adapted()
    whole = generate(model, TOKENIZER, PROMPTS, 12)
    stop = next(word for text in whole for word in text.split()[2:5])
    found = generate(model, TOKENIZER, PROMPTS, 12, stop=TOKENIZER.convert_tokens_to_ids([stop]))
    expected = [" ".join(cut(text.split(), stop)) for text in whole]
    assert expected != whole
    assert found == expected


def test_an_answer_to_labelled_tokens_ends_where_the_template_ends_turns():
    """As of `stop_ids` in a prompt: a turn that ends in another token than EOS."""
    model = adapted()
    [whole] = generate(model, TOKENIZER, ["a b c"], 12)
    tokenizer = word_tokenizer()
    end = whole.split()[3]
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})  # a word it writes
    tokens, _ = tokenise([Example("<s> a b c", "x", end=end)], tokenizer)
    (found,) = answer(model, tokenizer, collate(tokens, tokenizer.pad_token_id), 12)
    before = whole.split()[: whole.split().index(end)]
    assert found["prediction"].split() == before
    assert found["reference"] == "x"


def cut(words, stop):
    return words[: words.index(stop) + 1] if stop in words else words


def test_answer_takes_the_last_of_several_trained_turns():
    turns = Example("a b c d", "e", trained=((2, 5),))  # "b c" is an earlier answer
    batch = collate(tokenise([turns], TOKENIZER)[0], TOKENIZER.pad_token_id)
    assert (batch["labels"] != -100).tolist()[0] == [False, False, True, True, False, True, True]
    (found,) = answer(adapted(), TOKENIZER, batch, 5)
    assert (found["prompt"], found["reference"]) == ("a b c d", "e")


def test_answer_to_a_row_without_trained_tokens_takes_the_whole_row():
    batch = labelled([("a b", "c d e"), ("k l", "m")])
    batch["labels"][1] = -100
    model = adapted()
    found = answer(model, TOKENIZER, batch, 3)[1]
    ids = batch["input_ids"][1][batch["attention_mask"][1] == 1].tolist()
    assert found["reference"] == ""
    assert found["prompt"] == "k l m"
    assert found["prediction"] == generate_from_ids(model, TOKENIZER, [ids], 3)[0]


def test_answer_where_padding_and_end_of_sequence_are_one_token():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    found = answer(adapted(), tokenizer, labelled([("a", "b c d"), ("k l", "m")], tokenizer), 3)
    assert [row["reference"] for row in found] == ["b c d", "m"]
    assert [row["prompt"] for row in found] == ["a", "k l"]


# --- exact match ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("blue", "blue", True),
        ("  blue\n", "blue", True),
        ("a  b\nc", "a b c", True),
        ("Blue", "blue", False),
        ("blue.", "blue", False),
        ("", "blue", False),
        ("", "", True),
        ("ab", "a b", False),
        ("3 + 4 = 7\n#### 7", "four and three\n#### 7", True),
        ("#### 8", "so\n#### 7", False),
        ("7", "so\n#### 7", False),  # the form is part of the task
        ("#### 7 #### 9", "so\n#### 9", True),  # the last counts
        ("so 7\n#### 7 ", "#### 7", True),
        ("####", "#### 7", False),
        ("so\n#### 7", "7", False),  # a plain reference is compared as a whole
    ],
)
def test_exact_match_rules(prediction, reference, right):
    assert matches(prediction, reference) is right


def test_exact_match_is_counted_by_task_in_order_of_appearance():
    results = [("b", "x", "x"), ("a", "x", "y"), ("b", "x", "y"), ("", "z", "z"), ("a", "q", "q")]
    scores = exact_match(iter(results))
    assert list(scores) == ["b", "a", "all"]
    assert scores == {"b": Score(1, 2), "a": Score(1, 2), "all": Score(1, 1)}
    assert (scores["b"].share, str(scores["b"])) == (0.5, "1/2 (50%)")
    assert exact_match([]) == {}
    assert Score(0, 0).share == 0.0
