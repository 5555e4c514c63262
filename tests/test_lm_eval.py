"""Converted models in EleutherAI's lm-eval, as they are: a model in memory, or a folder, on a local task."""

import math
from pathlib import Path

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from tests.fixtures.load import gpt2_english

TASKS = Path(__file__).parent / "lm_eval_tasks"
CHAPTERS = 3
MAX_LENGTH = 128


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The self-trained GPT-2, an exact and a plain conversion of it, and their tokenizer."""
    teacher, tokenizer, texts = gpt2_english()
    students = [
        convert(teacher, AttentionSpec(metric), init=init)
        for metric, init in (("sqeuclidean", "exact"), ("l2", "plain"))
    ]
    return [teacher, *students], tokenizer, texts


def bits_per_byte(model, tokenizer, monkeypatch) -> float:
    """lm-eval's score of a model, or of the folder it was saved to."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS.parents[1])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(
        model=lm, tasks=["heldout_chapters"], task_manager=manager, limit=CHAPTERS, bootstrap_iters=0
    )
    return found["results"]["heldout_chapters"]["bits_per_byte,none"]


def expected(model, tokenizer, texts) -> float:
    """The same by hand: each token given those before it in its window of MAX_LENGTH, the first given the end token."""
    bits, count = 0.0, 0
    for text in texts[:CHAPTERS]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), MAX_LENGTH):
            window = ids[start : start + MAX_LENGTH]
            before = tokenizer.eos_token_id if start == 0 else ids[start - 1]
            # A last window that is short is filled up with what came before.
            context = ids[max(0, start + len(window) - MAX_LENGTH - 1) : start] if start else [before]
            with torch.no_grad():
                logits = model(torch.tensor([context + window[:-1]])).logits[0].double().log_softmax(-1)
            scores = logits[-len(window) :].gather(1, torch.tensor(window)[:, None])
            bits -= float(scores.sum()) / math.log(2)
        count += len(text.encode("utf-8"))
    return bits / count


def test_scores_of_teacher_and_students(checkpoints, monkeypatch, tmp_path):
    models, tokenizer, texts = checkpoints
    teacher, exact, plain = (bits_per_byte(model, tokenizer, monkeypatch) for model in models)
    assert teacher == pytest.approx(expected(models[0], tokenizer, texts), rel=1e-4)
    assert exact == pytest.approx(teacher, rel=1e-5)
    assert plain > 1.03 * teacher
    models[2].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert bits_per_byte(str(tmp_path), str(tmp_path), monkeypatch) == pytest.approx(plain, rel=1e-6)
