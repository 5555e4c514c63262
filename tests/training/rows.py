"""Small models and data for the tests of training: rows of token ids, texts, folders, and whole configurations."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.conversion.models import VOCAB


def rows(task: str, count: int = 16, length: int = 12, seed: int = 0) -> list[dict]:
    """Rows that repeat their first half; every second one ends in three padding tokens, but for causal-lm."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        half = torch.randint(3, VOCAB, (length // 2,), generator=generator)
        ids, mask = torch.cat([half, half]), torch.ones(length, dtype=torch.long)
        if task != "causal-lm" and number % 2:
            ids[-3:], mask[-3:] = 0, 0
        row = {"input_ids": ids, "attention_mask": mask}
        labels = ids.masked_fill(mask == 0, -100)
        if task == "sequence-classification":
            row["labels"] = torch.tensor(number % 2)
        elif task == "masked-lm":
            row["labels"] = torch.where(torch.rand(length, generator=generator) < 0.4, labels, -100)
        elif task != "embedding":
            row["labels"] = labels
        found.append(row)
    return found


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the rows, which are of one length."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}


def checkpoint(folder: Path, model) -> Path:
    """A folder with the model and a tokenizer of as many words as it has tokens: w3 is token 3."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w1")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_file(path: Path, count: int = 40, seed: int = 0, length: int = 24) -> Path:
    """A JSON-lines file of texts that repeat themselves, with a title (its first half) and a label."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        half = [f"w{i}" for i in torch.randint(3, VOCAB, (length // 2,), generator=generator).tolist()]
        text = " ".join(half + half)
        lines.append(json.dumps({"text": text, "title": " ".join(half), "label": number % 2}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def values(folder: Path, model, **changes) -> dict:
    """A small adaptation of `model`, as a YAML file would say it; everything it needs is in `folder`."""
    train = text_file(folder / "train.jsonl")
    return {
        "teacher": str(checkpoint(folder / "teacher", model)),
        "spec": {"metric": "l2"},
        "train_data": str(train),
        "eval_data": str(text_file(folder / "eval.jsonl", 12, seed=1)),
        "text_column": "text",
        "max_length": 16,
        "calibration_steps": 2,
        "stages": ["transfer", "distillation"],
        "learning_rate": 1e-3,
        "learning_rates": {"attention": 1e-2},
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
        "output_dir": str(folder / "run"),
        **changes,
    }
