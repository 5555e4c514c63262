"""What is wrong with arguments, data or model is said before anything is read."""

import pytest
from datasets import Dataset, Features, Value
from transformers import (
    GPT2Config,
)

from distattn_hf.data.datasets import DataArguments, build_data
from tests.training.data_cases import BOTH, CONFIGS, DECODER, build, make_tokenizer, texts

pytestmark = pytest.mark.usefixtures("own_cache")

# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be an integer >= 2, got 1"),
        ({"max_length": None}, "max_length must be an integer >= 2, got None"),
        ({"max_train_samples": 0}, "max_train_samples must be an integer >= 1 or None, got 0"),
        ({"num_proc": True}, "num_proc must be an integer >= 1 or None, got True"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"mlm_probability": 0.0}, r"mlm_probability must be in \(0, 1\], got 0.0"),
        ({"num_proc": 2, "streaming": True}, "num_proc must be None with streaming=True"),
        ({"train_data": ""}, "train_data must be a file"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"train_data": "news", **options})


ROWS = [{"text": "ab", "label": 1, "tokens": ["a"], "tags": [1], "n": 1}]


@pytest.mark.parametrize(
    ("task", "rows", "options", "message"),
    [
        ("language", ROWS, {}, "task must be one of causal-lm, .* got 'language'"),
        ("causal-lm", ROWS, {"tokenizer": "none"}, "tokenizer must be given"),
        ("causal-lm", ROWS, {"config": BOTH}, "task 'causal-lm' needs a model without an encoder and a decoder"),
        ("seq2seq", ROWS, {"config": DECODER}, "task 'seq2seq' needs a model with an encoder and a decoder"),
        ("causal-lm", ROWS, {"config": GPT2Config(vocab_size=13)}, "token 'j' with id 13, .* vocab_size is 13"),
        ("masked-lm", ROWS, {"tokenizer": make_tokenizer(pad=False)}, "must have a padding token for task 'masked-lm'"),
        (
            "causal-lm", ROWS, {"tokenizer": make_tokenizer(end=False, pad=False), "packing": False},
            "must have a padding token for task 'causal-lm'",
        ),
        ("causal-lm", ROWS, {}, "train_data holds fewer than max_length=64 tokens"),
        ("causal-lm", ROWS, {"max_length": 3, "pad_to_multiple_of": 2}, "pad_to_multiple_of must divide max_length"),
        ("embedding", [], {}, "holds no rows"),
        ("embedding", texts(" "), {}, "holds no rows with anything in text"),
        ("embedding", ROWS, {"text_column": "body"}, r"text_column must name a column .*\['text', .* for 'body'"),
        ("embedding", ROWS, {"text_column": "n"}, "column 'n' must hold text, got 1 of type int"),
        ("embedding", ROWS, {"train_split": "test"}, "train_split must be 'train' for data with a single split"),
        ("embedding", ROWS, {"eval_split": "test"}, "give eval_data as well"),
        ("seq2seq", ROWS, {}, "target_column must name a column .* looked for one of target, output"),
        ("seq2seq", ROWS, {"target_column": "text"}, "target_column must differ from source_column, got 'text'"),
        ("sequence-classification", texts("a"), {}, "label_column must name a column"),
        ("sequence-classification", [{"text": "a", "label": 3}], {}, "integers from 0 to 2 .* got 3"),
        ("sequence-classification", [{"text": "a", "label": -1}], {}, "integers from 0 to 2 .* got -1"),
        ("sequence-classification", [{"text": "a", "label": 0.5}], {}, "integers from 0 to 2 .* got 0.5"),
        (
            "sequence-classification", [{"text": "a", "label": name} for name in "wxyz"], {},
            r"4 classes \(w, x, y, z\), but the model's num_labels is 3; load the model with num_labels=4",
        ),
        ("token-classification", ROWS, {"label_column": "label"}, "'label' must hold a list of labels, got 1"),
        (
            "token-classification", [{"tokens": ["a", "b"], "tags": [1]}], {},
            r"'tags' must have one label for each word of 'tokens', got 1 for 2 words: \['a', 'b'\]",
        ),
        ("token-classification", [{"tokens": ["a"], "tags": [7]}], {}, "integers from 0 to 2 .* got 7"),
    ],
)  # fmt: skip
def test_data_and_model_are_checked(save, tmp_path, task, rows, options, message):
    options = dict(options)
    if rows:
        path = save(rows)
    else:
        Dataset.from_dict({"text": []}, features=Features({"text": Value("string")})).save_to_disk(tmp_path / "empty")
        path = str(tmp_path / "empty")
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    config = options.pop("config", None) or CONFIGS.get(task, DECODER)
    arguments = DataArguments(path, **{"max_length": 64, **options})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build_data(arguments, task, None if tokenizer == "none" else tokenizer, config)


def test_names_cannot_be_collected_from_a_stream(save):
    path = save([{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match="streaming=True cannot collect them first"):
        build("sequence-classification", train_data=path, streaming=True)


@pytest.mark.parametrize("name", ["there/is/none", "./none", "none.txt", "none.jsonl", "a_folder", "odd.bin"])
def test_sources_that_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "odd.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=f"train_data '{name}'"):
        build("embedding", train_data=name)


def test_a_broken_file_names_the_file(tmp_path):
    (tmp_path / "broken.json").write_text('{"text": "a"')
    with pytest.raises(ValueError, match="broken.json' cannot be read as json"):
        build("embedding", train_data=str(tmp_path / "broken.json"))
