"""Fixtures of the tests of training data."""

import json

import pytest
from datasets import Dataset, DatasetDict


@pytest.fixture
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
