"""Packing and every source of text, against rows written out by hand or by a few lines of Python."""

import socket
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
)

from distattn_hf import connection
from distattn_hf.data import sources
from distattn_hf.data.sources import read_texts
from tests.training.data_cases import (
    LETTERS,
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

# Packing


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
    monkeypatch.setattr(connection, "getproxies", dict)
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
