"""The rows of every task, against rows written out by hand or by a few lines of Python."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from distattn_hf.data.datasets import DataArguments
from tests.training.data_cases import (
    DECODER,
    TEXTS,
    build,
    column,
    ids,
    make_tokenizer,
    packed,
    propagating,
    texts,
)

pytestmark = pytest.mark.usefixtures("own_cache")

# Tasks


@pytest.mark.parametrize("streaming", [False, True])
def test_masked_rows(save, streaming):
    tokenizer = make_tokenizer(closing=True)
    path = save(texts(*["abcdefghij" * 4] * 8))
    options = {"train_data": path, "eval_data": path, "mlm_probability": 0.4, "streaming": streaming}
    data = build("masked-lm", tokenizer, **options)
    again = build("masked-lm", tokenizer, **options)
    other = build("masked-lm", tokenizer, seed=1, **options)
    rows = list(data.evaluation)
    assert rows == list(again.evaluation) == list(data.evaluation)
    assert rows != list(other.evaluation)
    original = [*ids("abcdefghij" * 4), 1]
    hidden = torch.tensor(column(rows, "labels"))
    assert len({tuple(row) for row in hidden.tolist()}) == 8, "equal texts have masks of their own"
    for row in rows:
        for token, label, expected in zip(row["input_ids"], row["labels"], original, strict=True):
            assert label in (-100, expected)
            assert label != -100 or token == expected
    assert (hidden[:, -1] == -100).all(), "the end token is special, so it is not asked for"
    share = (hidden[:, :-1] != -100).float().mean()
    assert abs(share - 0.4) < 6 * (0.4 * 0.6 / 320) ** 0.5

    two, eight = (torch.cat([data.collator(rows[i : i + n])["labels"] for i in range(0, 8, n)]) for n in (2, 8))
    assert torch.equal(two, eight)
    assert torch.equal(eight, hidden), "the collator must not mask a second time"
    training = [data.collator(list(data.train)) for _ in range(2)]
    assert not torch.equal(training[0]["labels"], training[1]["labels"]), "training masks are drawn anew"


def test_masked_rows_are_padded(save):
    path = save(texts("abcdefgh", "ab"))
    data = build("masked-lm", train_data=path, eval_data=path, mlm_probability=1.0)
    for rows in (data.train, data.evaluation):
        batch = data.collator(list(rows))
        assert batch["labels"].tolist() == [ids("abcdefgh"), [*ids("ab"), *[-100] * 6]]
        assert batch["attention_mask"].sum(1).tolist() == [8, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_sequence_to_sequence(save, streaming):
    rows = [{"source": "abc", "target": "de"}, {"source": "f", "target": "ghij"}, {"source": "a", "target": " "}]
    data = build("seq2seq", make_tokenizer(closing=True), train_data=save(rows), streaming=streaming, max_length=4)
    batch = data.collator(list(data.train))
    assert batch["input_ids"].tolist() == [[*ids("abc"), 1], [*ids("f"), 1, 0, 0]]
    assert batch["labels"].tolist() == [[*ids("de"), 1, -100], [*ids("ghi"), 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_as_numbers(save, streaming):
    rows = [{"text": "ab", "label": 2}, {"text": "c", "label": 0}]
    data = build("sequence-classification", train_data=save(rows), streaming=streaming)
    batch = data.collator(list(data.train))
    assert batch["labels"].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [ids("ab"), [*ids("c"), 0]]
    assert data.label_names is None


def test_labels_as_names_are_sorted_and_shared_with_the_evaluation(save):
    train = save([{"text": "ab", "label": "yes"}, {"text": "c", "label": "no"}])
    evaluation = save([{"text": "ab", "label": "yes"}], name="more")
    data = build("sequence-classification", train_data=train, eval_data=evaluation)
    assert data.label_names == ["no", "yes"]
    assert list(data.train["labels"]) == [1, 0]
    assert list(data.evaluation["labels"]) == [1]
    unknown = save([{"text": "ab", "label": "maybe"}], name="unknown")
    with pytest.raises(ValueError, match="must hold one of no, yes, got 'maybe'"):
        build("sequence-classification", train_data=train, eval_data=unknown)


def labelled(names, values):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["a"] * len(values), "label": values}, features=features)


def test_class_labels_keep_their_order_and_evaluation_is_matched_by_name(save):
    splits = DatasetDict(train=labelled(["x", "y"], [0, 1]), validation=labelled(["y", "x"], [0, 1]))
    data = build("sequence-classification", train_data=save(splits, "folder"))
    assert data.label_names == ["x", "y"]
    assert list(data.train["labels"]) == [0, 1]
    assert list(data.evaluation["labels"]) == [1, 0]


def test_a_model_that_knows_the_classes_keeps_its_ids(save):
    config = BertConfig(vocab_size=20, id2label={0: "y", 1: "x"}, label2id={"y": 0, "x": 1})
    path = save(labelled(["x", "y"], [0, 1]), "folder")
    data = build("sequence-classification", config=config, train_data=path)
    assert (data.label_names, list(data.train["labels"])) == (["y", "x"], [1, 0])
    data = build(
        "sequence-classification", config=config, train_data=save(labelled(["p", "q"], [0, 1]), "folder", "pq")
    )
    assert (data.label_names, list(data.train["labels"])) == (["p", "q"], [0, 1])


def test_the_models_own_names_rule_over_the_sorted_ones(save):
    config = BertConfig(vocab_size=20, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    path = save([{"text": "ab", "label": "yes"}, {"text": "c", "label": "no"}])
    for streaming in (False, True):
        data = build("sequence-classification", config=config, train_data=path, streaming=streaming)
        assert [row["labels"] for row in data.train] == [0, 1]
        assert data.label_names == ["yes", "no"]


def test_regression(save):
    config = BertConfig(vocab_size=20, num_labels=1)
    path = save([{"text": "ab", "label": 0.5}, {"text": "c", "label": -2.0}])
    data = build("sequence-classification", config=config, train_data=path)
    assert data.collator(list(data.train))["labels"].tolist() == [0.5, -2.0]


@pytest.mark.parametrize("streaming", [False, True])
def test_word_labels_stand_at_first_pieces(save, streaming):
    rows = [{"tokens": ["abc", "d"], "ner_tags": [1, 2]}, {"tokens": ["e"], "ner_tags": [0]}]
    data = build("token-classification", make_tokenizer(closing=True), train_data=save(rows), streaming=streaming)
    batch = data.collator(list(data.train))
    assert batch["input_ids"].tolist() == [[*ids("abcd"), 1], [*ids("e"), 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, -100, -100, 2, -100], [0, -100, -100, -100, -100]]


def test_word_labels_with_names(save):
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["O", "B"]))})
    table = Dataset.from_dict({"words": [["ab", "c"]], "tags": [[1, 0]]}, features=features)
    data = build("token-classification", train_data=save(table, "folder"))
    assert data.label_names == ["O", "B"]
    assert column(data.train, "labels") == [[1, -100, 0]]
    named = save([{"words": ["ab", "c"], "tags": ["B", "O"]}])
    data = build("token-classification", train_data=named)
    assert data.label_names == ["B", "O"]
    assert column(data.train, "labels") == [[0, -100, 1]]


def test_embedding_rows_are_padded_and_have_no_labels(save):
    data = build("embedding", train_data=save([{"text": "abc", "label": 1}, {"text": "d", "label": 0}]))
    batch = data.collator(list(data.train))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"} or set(batch) == {
        "input_ids",
        "attention_mask",
    }
    assert batch["input_ids"].tolist() == [ids("abc"), [*ids("d"), 0, 0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_texts_are_left_out(save, streaming):
    rows = [{"text": "ab"}, {"text": " \n"}, {"text": None}, {"text": "c"}]
    assert column(build("embedding", train_data=save(rows), streaming=streaming).train) == [ids("ab"), ids("c")]


def test_columns_by_name_and_the_only_column_of_strings(save):
    path = save([{"body": "ab", "number": 3}])
    assert column(build("embedding", train_data=path).train) == [ids("ab")]
    path = save([{"body": "ab", "other": "cd"}], name="two")
    assert column(build("embedding", train_data=path, text_column="other").train) == [ids("cd")]
    with pytest.raises(ValueError, match=r"text_column must name a column of the data, \['body', 'other'\]"):
        build("embedding", train_data=path)


def test_length_is_clamped_to_the_model_and_to_the_tokenizer(save, caplog):
    path = save(texts("abcdefghij" * 20))
    with propagating(caplog):
        data = build("causal-lm", train_data=path, max_length=1000)
    assert len(data.train[0]["input_ids"]) == 64
    assert "max_length=1000" in caplog.text
    short = GPT2Config(vocab_size=20, n_positions=16)
    assert len(build("causal-lm", config=short, train_data=path).train[0]["input_ids"]) == 16
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    assert len(build("embedding", tokenizer, train_data=path).train[0]["input_ids"]) == 8


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_several_processes_give_the_same_rows(save, task):
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    one, two = (build(task, train_data=save(rows), max_length=4, num_proc=n) for n in (None, 2))
    assert list(one.train) == list(two.train)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_trainer_takes_it(save, tmp_path, streaming):
    data = build(
        "causal-lm", train_data=save(texts()), eval_data=save(texts(), name="b"), max_length=5, streaming=streaming
    )
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        GPT2LMHeadModel(DECODER), arguments, train_dataset=data.train, eval_dataset=data.evaluation,
        data_collator=data.collator,
    )  # fmt: skip
    trainer.train()
    rows = torch.tensor(packed(TEXTS, 5))
    with torch.no_grad():
        likelihoods = trainer.model.eval()(rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-float(likelihoods.mean()), rel=1e-5)


def test_arguments_come_from_a_command_line():
    (arguments,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--train_data", "news", "--max_length", "64", "--packing", "False", "--streaming", "--max_eval_samples", "3"]
    )
    expected = DataArguments("news", max_length=64, packing=False, streaming=True, max_eval_samples=3)
    assert arguments == expected
    assert all(field.metadata.get("help") for field in DataArguments.__dataclass_fields__.values())
