"""Trains each case for a few steps and writes the losses: in one process, or as one of several of torchrun.

Beside them, how many steps DDP takes of models whose Nyström heads attend exactly to all of a short text.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from distattn_hf import AttentionSpec, DistAttnConfig, DistAttnForCausalLM, DistAttnForMaskedLM, convert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.training.stages import Stage, StageOptions
from distattn_hf.training.trainer import AdaptationTrainer
from tests.conversion.models import FAMILIES, VOCAB
from tests.training.rows import collate, rows

# (family, task, stage, what trains, parts of a step), and what is annealed
CASES = [
    ("llama", "causal-lm", "transfer", "attention", 1),
    ("t5", "seq2seq", "transfer", "attention+qk", 1),
    ("bert", "masked-lm", "distillation", "attention+qk", 2),
    ("llama", "causal-lm", "distillation", "all", 1),
    ("bert", "masked-lm", "task", "all", 1),
    ("llama", "causal-lm", "task", "lora", 2),
    ("llama", "causal-lm", "distillation", "all", 2, {"alpha": 1.0}),
]
STEPS = 5
ROWS_A_STEP = 8
NYSTROM = {"num_landmarks": 4, "window_size": 3, "num_sinks": 1, "exact_below": 64}


def losses(case, processes: int) -> list[float]:
    """The loss of each of five steps of 8 rows, and the one on held-out rows at the end."""
    family, task, name, train, parts, *annealed = case
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
    if annealed:
        with torch.no_grad():
            for state in student.attention_states.values():
                state.groups[0].log_alpha.fill_(-1.0)
    options = StageOptions(
        train=train,
        learning_rates={"attention": 1e-2},
        task_weight=0.5,
        anneal=annealed[0] if annealed else {},
    )
    stage = Stage(name, student, teacher, task, options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS_A_STEP // parts // processes, learning_rate=1e-3,
            gradient_accumulation_steps=parts, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
            save_strategy="no", train_sampling_strategy="sequential", seed=0,
        )  # fmt: skip
        data = rows(task, 8 * STEPS)
        trainer = AdaptationTrainer(stage, arguments, train_dataset=data, eval_dataset=data[:8], data_collator=collate)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*found, trainer.evaluate()["eval_loss"]]


def nystrom_models() -> dict[str, torch.nn.Module]:
    """Converted and native models whose Nyström heads attend exactly to at most 64 tokens."""
    spec, quick = AttentionSpec(mechanism="nystrom", **NYSTROM), CalibrationOptions(steps=1, progress=False)
    text = [{"input_ids": torch.randint(3, VOCAB, (2, 40))}]
    found = {family: convert(FAMILIES[family](), spec, calibration=text, options=quick) for family in ("llama", "bert")}
    for kind in (DistAttnForCausalLM, DistAttnForMaskedLM):
        config = DistAttnConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mechanism="nystrom",
            mechanism_options=NYSTROM, is_decoder=kind is DistAttnForCausalLM,
        )  # fmt: skip
        found[kind.__name__] = kind(config)
    return found


def steps_of_ddp(model: torch.nn.Module) -> int | str:
    """How many of two steps DDP takes that waits for a gradient of every parameter; else what it says."""
    parallel = DistributedDataParallel(model.train())
    for step in range(2):
        ids = torch.randint(3, VOCAB, (2, 9))
        try:
            parallel(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError as error:
            return f"step {step}: {str(error)[:60]}"
    return step + 1


if __name__ == "__main__":
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    results = [losses(case, world) for case in CASES]
    steps = {name: steps_of_ddp(model) for name, model in nystrom_models().items()}
    if torch.distributed.get_rank() == 0:
        found = {"processes": torch.distributed.get_world_size(), "losses": results, "steps": steps}
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
