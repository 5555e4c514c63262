"""The main job on two real checkpoints: convert, compare, fine-tune, save, reload, evaluate, one table."""

import argparse
import math
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from distattn_hf import AttentionSpec, convert, load_checkpoint
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.data.packing import pack
from distattn_hf.data.sources import news_articles
from distattn_hf.evaluation.score import EvaluationOptions, embedding_agreement, evaluate_model

logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*pin_memory.*")


# Half the default steps or less: the demo is to be short.
FIT = CalibrationOptions(steps=50)


def sentence_encoder(articles: list[dict]) -> list[list[str]]:
    """MiniLM (BERT): title-to-article retrieval on articles the calibration has not seen."""
    model, tokenizer = load_checkpoint("minilm")
    calibration = [a["text"] for a in articles[:64]]
    pairs = [(a["title"], a["text"]) for a in articles[-150:]]
    options = EvaluationOptions(progress=False)
    teacher = evaluate_model(model, tokenizer, [], pairs=pairs, options=options)["mrr"]
    rows = [["MiniLM (BERT)", "untouched", "-", f"{teacher:.4f}", "1.0000", "-"]]
    for metric, init in (("sqeuclidean", "exact"), ("l2", "plain"), ("l2", "calibrated"), ("cosine", "calibrated")):
        texts = calibration if init == "calibrated" else None
        student = convert(model, AttentionSpec(metric), init=init, calibration=texts, tokenizer=tokenizer, options=FIT)
        score = evaluate_model(student, tokenizer, [], pairs=pairs, options=options)["mrr"]
        agreement = embedding_agreement(student, model, tokenizer, [p[1] for p in pairs[:64]], options)
        rows.append(["MiniLM (BERT)", metric, init, f"{score:.4f}", f"{score / teacher:.4f}", f"cos {agreement:.4f}"])
        print("  ".join(rows[-1]), flush=True)
    return rows


def language_model(articles: list[dict], folder: Path) -> list[list[str]]:
    """SmolLM2-135M (Llama): perplexity on unseen articles; then a brief fine-tuning, saved and reloaded."""
    model, tokenizer = load_checkpoint("smollm2-135m")
    calibration = [a["text"] for a in articles[:200]]
    held_out = [a["text"] for a in articles[3000:]]
    options = EvaluationOptions(max_length=256, max_tokens=2048, progress=False)

    def perplexity(candidate):
        return evaluate_model(candidate, tokenizer, held_out, options=options)["perplexity"]

    teacher = perplexity(model)
    rows = [["SmolLM2-135M (Llama)", "untouched", "-", f"{teacher:.2f}", "1.0000", "-"]]
    for metric, init in (("sqeuclidean", "exact"), ("l2", "plain"), ("l2", "calibrated")):
        texts = calibration if init == "calibrated" else None
        student = convert(model, AttentionSpec(metric), init=init, calibration=texts, tokenizer=tokenizer, options=FIT)
        score = perplexity(student)
        alpha, ratio = student.conversion_report.mean_alpha, student.conversion_report.median_softening_ratio
        note = "-" if alpha is None else f"mean α {alpha:.2f}"
        note += "" if ratio is None else f", ε/median {ratio:.2g}"
        rows.append(["SmolLM2-135M (Llama)", metric, init, f"{score:.2f}", f"{score / teacher:.4f}", note])
        print("  ".join(rows[-1]), flush=True)

    fine_tune(student, tokenizer, [a["text"] for a in articles[200:400]], folder / "run")
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    prompt = tokenizer("The president said on Tuesday that", return_tensors="pt")
    same = torch.equal(student(**prompt).logits, reloaded(**prompt).logits)
    score = perplexity(reloaded)
    rows.append(["SmolLM2-135M (Llama)", "l2", "+ fine-tuned", f"{score:.2f}", f"{score / teacher:.4f}", "reloaded"])
    text = tokenizer.decode(
        reloaded.generate(**prompt, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True
    )
    print(f"reloaded as {type(reloaded).__name__}, logits bit-equal: {same}")
    print(f"generates: {text}")
    if not same or not math.isfinite(score):
        raise SystemExit("the reloaded model differs from the one that was saved")
    return rows


def fine_tune(student, tokenizer, texts, folder) -> None:
    """Eight steps of plain `Trainer`: enough to show that it runs, not to reach the teacher."""
    rows = Dataset.from_dict({"input_ids": pack(tokenizer, texts, 128, 32 * 128)[0].tolist()})
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=2e-5, report_to=[], save_strategy="no",
        logging_steps=4, use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(student, arguments, train_dataset=rows, data_collator=collator).train()
    student.eval()


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="keep the fine-tuned checkpoint in this folder")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    articles = news_articles()
    rows = sentence_encoder(articles)
    with tempfile.TemporaryDirectory() as temporary:
        rows += language_model(articles, arguments.keep or Path(temporary))
    header = ["model", "attention", "conversion", "score", "to teacher", "note"]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print("\nMiniLM: mean reciprocal rank, title to article, 150 unseen articles (higher is better).")
    print("SmolLM2: perplexity on unseen articles, 2,048 tokens (lower is better).\n")
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
