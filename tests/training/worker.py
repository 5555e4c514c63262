"""Trains each case for a few steps and writes the losses: in one process, or as one of several of torchrun."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainingArguments

from distattn_hf import AttentionSpec, convert
from distattn_hf.training.stages import Stage, StageOptions
from distattn_hf.training.trainer import AdaptationTrainer
from tests.conversion.models import FAMILIES
from tests.training.rows import collate, rows

# (family, task, stage, what trains, parts of a step)
CASES = [
    ("llama", "causal-lm", "transfer", "attention", 1),
    ("t5", "seq2seq", "transfer", "attention+qk", 1),
    ("bert", "masked-lm", "distillation", "attention+qk", 2),
    ("llama", "causal-lm", "distillation", "all", 1),
    ("bert", "masked-lm", "task", "all", 1),
    ("llama", "causal-lm", "task", "lora", 2),
]
ROWS_A_STEP = 8


def losses(case, processes: int) -> list[float]:
    """The loss of each of four steps of 8 rows, and the one on held-out rows at the end."""
    family, task, name, train, parts = case
    torch.manual_seed(0)
    teacher = FAMILIES[family]()
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = teacher.config
    for field in ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    student = convert(teacher, AttentionSpec("l2", transform="scalar"), init="plain")
    options = StageOptions(train=train, learning_rates={"attention": 1e-2}, task_weight=0.5)
    stage = Stage(name, student, teacher, task, options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=4, per_device_train_batch_size=ROWS_A_STEP // parts // processes, learning_rate=1e-3,
            gradient_accumulation_steps=parts, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
            save_strategy="no", train_sampling_strategy="sequential", seed=0,
        )  # fmt: skip
        data = rows(task, 32)
        trainer = AdaptationTrainer(stage, arguments, train_dataset=data, eval_dataset=data[:8], data_collator=collate)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*found, trainer.evaluate()["eval_loss"]]


if __name__ == "__main__":
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    results = [losses(case, world) for case in CASES]
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"processes": torch.distributed.get_world_size(), "losses": results}))
    torch.distributed.destroy_process_group()
