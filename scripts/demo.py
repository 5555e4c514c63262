"""A tour on real checkpoints: choose an attention, read long text, fine-tune, reload, look: a table and a page."""

import argparse
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from distattn_hf import AttentionSpec, CalibrationOptions, convert, load_checkpoint
from distattn_hf.analysis.analyse import AnalyseOptions, analyse
from distattn_hf.data.packing import pack
from distattn_hf.data.sources import news_articles, read_texts
from distattn_hf.evaluation.long_text_scores import LongTextOptions, score_cell
from distattn_hf.evaluation.retrieval_tasks import Haystack
from distattn_hf.evaluation.score import EvaluationOptions, embedding_agreement, evaluate_model
from distattn_hf.evaluation.scorecard import without_far_field

logging.set_verbosity_error()
warnings.filterwarnings("ignore")

# Few steps on little text: the demo is to be short.
FIT = CalibrationOptions(steps=15, max_tokens=2048, progress=False)
GPT2 = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "gpt2-english"
LENGTH = 1024


def choices(articles: list[dict]) -> list[list[str]]:
    """MiniLM (BERT): title to article, among articles that no fit saw, with each kind of attention."""
    model, tokenizer = load_checkpoint("minilm")
    texts = [article["text"] for article in articles[:48]]
    pairs = [(article["title"], article["text"]) for article in articles[-40:]]
    options = EvaluationOptions(progress=False)
    teacher = evaluate_model(model, tokenizer, [], pairs=pairs, options=options)["mrr"]
    rows = [["MiniLM (BERT)", "untouched", "", "mean reciprocal rank", f"{teacher:.4f}", ""]]
    say(rows[-1])
    retrieval = AttentionSpec(mechanism="retrieval", num_blocks=4)
    for name, spec, init in (
        ("sqeuclidean", AttentionSpec("sqeuclidean"), "exact"),
        ("l2", AttentionSpec("l2"), "plain"),
        ("l2", AttentionSpec("l2"), "calibrated"),
        ("retrieval, 128 keys", retrieval, "exact"),
    ):
        given = {"calibration": texts, "tokenizer": tokenizer, "options": FIT} if init == "calibrated" else {}
        student = convert(model, spec, init=init, **given)
        score = evaluate_model(student, tokenizer, [], pairs=pairs, options=options)["mrr"]
        cosine = embedding_agreement(student, model, tokenizer, [text for _, text in pairs[:16]], options)
        rows.append(
            ["MiniLM (BERT)", name, init, "mean reciprocal rank", f"{score:.4f}", f"embeddings' cosine {cosine:.4f}"]
        )
        say(rows[-1])
    return rows


def long_text(articles: list[dict]) -> list[list[str]]:
    """SmolLM2-135M (Llama): is a number that stands far back still found, and what is the text's perplexity."""
    model, tokenizer = load_checkpoint("smollm2-135m")
    haystack = Haystack(tokenizer, [article["text"] for article in articles[3000:3200]])
    passkey = LongTextOptions("passkey", (LENGTH,), (0.3,), samples=2)
    perplexity = LongTextOptions("perplexity", (LENGTH,), samples=1)
    retrieval = convert(model, AttentionSpec(mechanism="retrieval"))
    rows = []
    for name, student in (
        ("untouched", model),
        ("retrieval", retrieval),
        ("sinks and window alone", without_far_field(retrieval)),
    ):
        found = score_cell(student, passkey.questions(haystack, LENGTH, 0.3), passkey)
        text = score_cell(student, perplexity.questions(haystack, LENGTH), perplexity)["perplexity"]
        kind = "" if student is model else "exact"
        note = f"number found {found['hits']} of {found['samples']}"
        rows.append(["SmolLM2-135M (Llama)", name, kind, f"perplexity, {LENGTH:,} tokens", f"{text:.2f}", note])
        say(rows[-1])
    return rows


def fine_tuned(folder: Path) -> list[list[str]]:
    """A self-trained GPT-2 and its l2 conversion, fine-tuned as long, saved, reloaded, evaluated, and looked at."""
    teacher, tokenizer = load_checkpoint(GPT2)
    texts = read_texts(str(GPT2 / "heldout.txt"))
    train, held_out = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    student = convert(teacher, "l2", calibration=train, tokenizer=tokenizer, options=FIT)
    options = EvaluationOptions(max_length=256, max_tokens=2048, progress=False)

    def perplexity(model):
        return evaluate_model(model, tokenizer, held_out, options=options)["perplexity"]

    rows = []
    for model, name, kind in ((teacher, "untouched", ""), (student, "l2", "calibrated")):
        before = perplexity(model)
        train_briefly(model, tokenizer, train, folder / "run")
        rows.append(
            ["self-trained GPT-2", name, kind, "perplexity", f"{before:.2f}", f"fine-tuned {perplexity(model):.2f}"]
        )
        say(rows[-1])
        out = folder / ("student" if model is student else "teacher")
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    prompt = tokenizer("And it came to pass", return_tensors="pt")
    same = torch.equal(student(**prompt).logits, reloaded(**prompt).logits)
    written = reloaded.generate(**prompt, max_new_tokens=16, do_sample=False)
    print(f"saved, and reloaded as {type(reloaded).__name__}: logits bit-equal: {same}")
    print(f"it writes: {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
    if not same:
        raise SystemExit("the reloaded model differs from the one that was saved")
    look = AnalyseOptions(max_length=64, importance=False)
    report = folder / "report"
    analyse(folder / "student", held_out[-4:], report, against=folder / "teacher", options=look, overwrite=True)
    return rows


def train_briefly(model, tokenizer, texts: list[str], folder: Path) -> None:
    """Take twenty steps of plain `Trainer`."""
    ids = pack(tokenizer, texts, 128, 64 * 128)[0].tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=2e-5, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()


def say(row: list[str]) -> None:
    print("  ".join(filter(None, row)), flush=True)


def main() -> None:
    """Run all, print the table, and say where the page is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="checkpoints and report.html; default out/demo"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    articles = news_articles()
    rows = [*choices(articles), *long_text(articles), *fine_tuned(arguments.out)]
    header = ["model", "attention", "conversion", "measure", "score", ""]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print()
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nwhat the attention does, beside the teacher's: {arguments.out / 'report' / 'report.html'}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
