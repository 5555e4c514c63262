"""Every source and every task, against rows written out by hand or by a few lines of Python."""

import json
import logging
import socket
import time

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    T5Config,
    Trainer,
    TrainingArguments,
)

from distattn_hf.conversion.texts import read_texts
from distattn_hf.training import sources
from distattn_hf.training.data import TASKS, DataArguments, build_data

LETTERS = "abcdefghij"
TEXTS = ["abc", "de", "fghij", "a", "jihgfedcba", "bb"]
SPECIAL = ["<pad>", "<end>", "<mask>", "<unk>"]


def make_tokenizer(*, end=True, pad=True, closing=False):
    """Letters one by one: <pad> 0, <end> 1, <mask> 2, <unk> 3, a 4, b 5, ...; `closing` puts <end> after each text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    names = {"unk_token": "<unk>", "mask_token": "<mask>"}
    names |= {"eos_token": "<end>"} if end else {}
    names |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def ids(text):
    return [4 + LETTERS.index(letter) for letter in text]


DECODER = GPT2Config(vocab_size=20, n_positions=64, n_embd=8, n_layer=1, n_head=2)
ENCODER = BertConfig(vocab_size=20, max_position_embeddings=64, num_labels=3)
BOTH = T5Config(vocab_size=20, d_model=8, num_layers=1, num_heads=2)
CONFIGS = dict.fromkeys(TASKS, ENCODER) | {"causal-lm": DECODER, "seq2seq": BOTH}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def save(tmp_path):
    """save(rows, kind, name) -> what DataArguments takes."""

    def write(rows, kind="jsonl", name="data"):
        path = tmp_path / f"{name}.{kind}"
        if isinstance(rows, DatasetDict | Dataset) and kind == "folder":
            rows.save_to_disk(path)
            return str(path)
        table = Dataset.from_list(rows)
        if kind == "txt":
            path.write_text("\n\n".join(row["text"] for row in rows))
        elif kind == "folder":
            table.save_to_disk(path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, sep={"csv": ",", "tsv": "\t"}[kind])
        return str(path)

    return write


def texts(*values):
    return [{"text": value} for value in values or TEXTS]


def build(task, tokenizer=None, config=None, **arguments):
    return build_data(DataArguments(**arguments), task, tokenizer or make_tokenizer(), config or CONFIGS[task])


def column(rows, name="input_ids"):
    return [list(row[name]) for row in rows]


# Packing


def packed(documents, length):
    """The oracle: one long list, cut into rows."""
    stream = [i for text in documents for i in (*ids(text), 1)]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [2, 5, 7, 29])
def test_packing_loses_only_the_incomplete_last_row(save, length, streaming):
    data = build("causal-lm", train_data=save(texts()), max_length=length, streaming=streaming)
    rows = column(data.train)
    assert rows == packed(TEXTS, length)
    assert column(data.train, "labels") == [[-100, *row[1:]] for row in rows]
    assert isinstance(data.train, IterableDataset) == streaming
    assert data.evaluation is None


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_across_the_batches_of_a_map(save, streaming):
    """2,500 documents are three batches of `datasets.map`, whose ends must not show."""
    generator = np.random.default_rng(0)
    documents = ["".join(generator.choice(list(LETTERS), generator.integers(1, 6))) for _ in range(2500)]
    data = build("causal-lm", train_data=save(texts(*documents)), max_length=13, streaming=streaming)
    assert column(data.train) == packed(documents, 13)
    assert column(data.train) == packed(documents, 13), "a second epoch reads the same rows"


def test_packed_batches_have_no_padding(save):
    data = build("causal-lm", train_data=save(texts()), max_length=7)
    batch = next(iter(DataLoader(data.train, batch_size=3, collate_fn=data.collator)))
    assert batch["input_ids"].tolist() == packed(TEXTS, 7)[:3]
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_end_token_is_learnt_even_when_it_pads(save, caplog):
    """transformers' language-modeling collator drops every end token that is also the padding token."""
    tokenizer = make_tokenizer(pad=False)
    arguments = {"train_data": save(texts("abc", "de")), "max_length": 8, "packing": False}
    with propagating(caplog):
        data = build("causal-lm", tokenizer, **arguments)
    assert tokenizer.pad_token == "<end>"
    assert "no padding token" in caplog.text
    batch = data.collator(list(data.train))
    assert batch["input_ids"].tolist() == [[*ids("abc"), 1], [*ids("de"), 1, 1]]
    assert batch["labels"].tolist() == [[-100, *ids("bc"), 1], [-100, *ids("e"), 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_unpacked_rows_are_cut_and_padded_to_the_multiple(save):
    data = build(
        "causal-lm", train_data=save(texts()), max_length=6, packing=False, pad_to_multiple_of=4, max_train_samples=5
    )
    assert column(data.train) == [(ids(text) + [1])[:6] for text in TEXTS[:5]]
    assert data.collator(list(data.train))["input_ids"].shape == (5, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_limits_count_rows(save, streaming):
    files = {"train_data": save(texts()), "eval_data": save(texts(), name="more"), "streaming": streaming}
    data = build("causal-lm", max_length=3, max_train_samples=2, max_eval_samples=1, **files)
    assert column(data.train) == packed(TEXTS, 3)[:2]
    assert column(data.evaluation) == packed(TEXTS, 3)[:1]
    data = build("embedding", max_train_samples=2, max_eval_samples=100, **files)
    assert column(data.train) == [ids("abc"), ids("de")]
    assert len(list(data.evaluation)) == len(TEXTS)


def test_packing_without_an_end_token_says_so(save, caplog):
    with propagating(caplog):
        data = build("causal-lm", make_tokenizer(end=False, pad=False), train_data=save(texts()), max_length=4)
    assert "no end token" in caplog.text
    stream = ids("".join(TEXTS))
    assert column(data.train) == [stream[i : i + 4] for i in range(0, len(stream) - 3, 4)]


# Sources


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "tsv", "parquet", "folder"])
def test_every_source_gives_the_same_rows(save, kind, streaming):
    rows = [{"number": i, "text": text} for i, text in enumerate(TEXTS)]
    data = build("embedding", train_data=save(rows, kind), streaming=streaming)
    assert column(data.train) == [ids(text) for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_a_text_file_are_those_of_read_texts(tmp_path, streaming):
    path = tmp_path / "odd.txt"
    path.write_bytes(b"\n\n  ab\ncd \r\n\r\n\n\n \n\ne f\n\n\n\n\n  \n\n gh\n")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # white space shows, as <unk>
    expected = [[ids(c)[0] if c in LETTERS else 3 for c in text] for text in read_texts(str(path))]
    assert len(expected) == 3
    assert column(build("embedding", tokenizer, train_data=str(path), streaming=streaming).train) == expected


def test_words_that_spreadsheets_take_for_nothing_are_text(save):
    path = save([{"text": word, "label": i} for i, word in enumerate(["null", "nan", "NA"])], "csv")
    config = BertConfig(vocab_size=20, num_labels=3)
    data = build("sequence-classification", config=config, train_data=path)
    assert list(data.train["labels"]) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_saved_folder(save, streaming):
    def part(text):
        return Dataset.from_list(texts(text))

    def rows(splits, **options):
        folder = save(DatasetDict({name: part(text) for name, text in splits.items()}), "folder", str(len(options)))
        data = build("embedding", train_data=folder, streaming=streaming, **options)
        return column(data.train), None if data.evaluation is None else column(data.evaluation)

    three = {"train": "a", "validation": "b", "test": "c"}
    assert rows(three) == ([ids("a")], [ids("b")])
    assert rows(three, eval_split="test") == ([ids("a")], [ids("c")])
    assert rows(three, train_split="validation", eval_split="train") == ([ids("b")], [ids("a")])


def test_evaluation_falls_back_to_test_then_to_nothing(save, caplog):
    def part(text):
        return Dataset.from_list(texts(text))

    with propagating(caplog):
        two = save(DatasetDict(train=part("a"), test=part("c")), "folder", "two")
        assert column(build("embedding", train_data=two).evaluation) == [ids("c")]
    assert "'test' is used" in caplog.text
    one = save(DatasetDict(train=part("a")), "folder", "one")
    assert build("embedding", train_data=one).evaluation is None
    with pytest.raises(ValueError, match="eval_split must be one of train, test for .* got 'dev'"):
        build("embedding", train_data=two, eval_split="dev")
    with pytest.raises(ValueError, match="eval_split must be one of train for .* got 'validation'"):
        build("embedding", train_data=two, eval_data=one)
    with pytest.raises(ValueError, match="train_split must be one of train, test for .* got 'all'"):
        build("embedding", train_data=two, train_split="all")


def test_news(monkeypatch):
    articles = [{"title": "a", "text": "b"}] * 3000 + [{"title": "c", "text": "de"}] * 4
    monkeypatch.setattr(sources, "news_articles", lambda: articles)
    data = build("embedding", train_data="news")
    assert len(data.train) == 3000
    assert column(data.evaluation) == [ids("de")] * 4
    pairs = build("seq2seq", make_tokenizer(closing=True), train_data="news", streaming=True).evaluation
    assert [(r["input_ids"], r["labels"]) for r in pairs] == [([*ids("de"), 1], [*ids("c"), 1])] * 4


def test_a_hub_name_offline_fails_at_once_and_says_what_is_allowed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked although HF_HUB_OFFLINE is set")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    start = time.monotonic()
    with pytest.raises(ValueError, match="(?s)'no/such'.*local file or folder.*Hub.*HF_HUB_OFFLINE.*a file.*'news'"):
        build("embedding", train_data="no/such")
    assert time.monotonic() - start < 10


def test_a_hub_name_without_a_network_fails_at_once(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(sources.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match="'no/such'.*cannot be reached.*HF_HUB_OFFLINE=1"):
        build("embedding", train_data="no/such")


def test_a_hub_name_goes_through_load_dataset(monkeypatch):
    asked = {}

    def load_dataset(name, config_name, *, streaming):
        asked.update(name=name, config_name=config_name, streaming=streaming)
        return DatasetDict(train=Dataset.from_list(texts("a")), validation=Dataset.from_list(texts("b")))

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    data = build("embedding", train_data="some/data", config_name="small")
    assert (column(data.train), column(data.evaluation)) == ([ids("a")], [ids("b")])
    assert asked == {"name": "some/data", "config_name": "small", "streaming": False}


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


class propagating:
    """transformers' loggers do not pass on what they say, and caplog listens at the root."""

    def __init__(self, caplog):
        self.caplog, self.logger = caplog, logging.getLogger("distattn_hf.training.data")

    def __enter__(self):
        self.logger.addHandler(self.caplog.handler)

    def __exit__(self, *details):
        self.logger.removeHandler(self.caplog.handler)
