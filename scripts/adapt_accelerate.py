"""The stages of `distattn adapt` as a plain Accelerate loop, to read and to change.

accelerate launch scripts/adapt_accelerate.py configs/training/minilm_l1.yaml [key=value ...]

Same YAML, same losses, same folders as `distattn adapt`; no scorecard and no evaluation, and what it does not do of
TrainingArguments is refused. Run it again to go on where it stopped.
"""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from distattn_hf.data.datasets import build_data, check_data, check_tokenizers, row_length
from distattn_hf.storage.companions import Source
from distattn_hf.storage.folders import save_checkpoint
from distattn_hf.storage.models import load_checkpoint
from distattn_hf.training.adapt import check_arguments, converted, first_batches, task_of
from distattn_hf.training.arguments import read_config
from distattn_hf.training.stages import Stage, attention_means, check_stages
from distattn_hf.training.trainer import check_pair

# What this loop does as TrainingArguments says, and what changes nothing that is trained or saved at the end.
HONOURED = {
    *("output_dir", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "use_cpu", "tf32", "activation_checkpointing", "gradient_checkpointing"),
    *("train_sampling_strategy", "logging_steps", "save_steps"),
    *("save_total_limit", "per_device_eval_batch_size", "report_to", "run_name", "disable_tqdm", "log_level"),
}
SAMPLING = ("random", "sequential")


def refuse_ignored(config) -> None:
    """Raise `ValueError` for what TrainingArguments has and this loop does not do."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    stages = config.adaptation.stage_options
    for where, given in (("", config.values), *((f"stage_options.{name}.", stages[name]) for name in stages)):
        for name, value in given.items():
            if name in defaults and name not in HONOURED and value != defaults[name]:
                raise ValueError(f"{where}{name}={value!r}: this loop does not do that; `distattn adapt` does")
            if name == "train_sampling_strategy" and value not in SAMPLING:
                raise ValueError(
                    f"{where}{name} must be one of {', '.join(SAMPLING)} in this loop, got {value!r}; `distattn adapt` "
                    "takes it"
                )
            if where and name in ("bf16", "fp16", "use_cpu") and value != getattr(config.training, name):
                raise ValueError(f"{where}{name}={value!r}: all stages of this loop share it; set {name} itself")


def main() -> None:
    """Convert, then run the stages one after another."""
    config = read_config(sys.argv[1], sys.argv[2:])
    refuse_ignored(config)
    out = Path(config.training.output_dir)
    # Before the Accelerator: each TrainingArguments sets up devices anew and forgets what an Accelerator has set up.
    stages = {name: config.training_for(name) for name in config.adaptation.stages}
    accelerator = Accelerator(
        cpu=config.training.use_cpu,
        mixed_precision=config.training.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # A step of the schedule is a step of training, whatever the number of processes.
        step_scheduler_with_optimizer=False,
    )
    teacher, tokenizer = load_checkpoint(config.model.teacher)
    check_tokenizers(teacher, tokenizer)
    task = task_of(teacher)
    with accelerator.main_process_first():
        data = build_data(config.data, task, tokenizer, teacher.config)
    check_data("train_data", data.train)
    check_arguments(config, accelerator)

    folder = out / "calibrated"
    if accelerator.is_main_process and not folder.exists():
        given = config.model.student
        student = load_checkpoint(given)[0] if given else converted(config, teacher, tokenizer, data)
        save_checkpoint(student, tokenizer, folder, source=Source(given or config.model.teacher))
    accelerator.wait_for_everyone()
    options = {name: config.adaptation.options_for(name) for name in stages}
    length = row_length(config.data, tokenizer, teacher.config)
    check_stages(load_checkpoint(folder)[0], teacher, task, options, length)

    for name, arguments in stages.items():
        final = out / name / "final"
        if not final.exists():
            student = load_checkpoint(folder)[0]
            check_pair(teacher, student)
            run_stage(accelerator, config, name, arguments, student, teacher, tokenizer, task, data, final)
        folder = final
    accelerator.print(f"saved to {folder}")
    accelerator.end_training()


def run_stage(accelerator, config, name, arguments, student, teacher, tokenizer, task, data, final: Path) -> None:
    """Train one stage and save the student to `final`, and the loss of each step beside it."""
    options = config.adaptation.options_for(name)
    set_seed(arguments.seed)
    stage = Stage(name, student, teacher, task, options, recompute=arguments.activation_checkpointing)
    if arguments.activation_checkpointing and name != "transfer":
        stage.model.activation_checkpointing_enable()
    stage.place(accelerator.device)
    loader = DataLoader(
        data.train,
        batch_size=arguments.per_device_train_batch_size,
        shuffle=arguments.train_sampling_strategy == "random" and not config.data.streaming,
        collate_fn=data.collator,
    )
    if stage.annealing is not None and stage.annealing.needs_batches:
        student.to(accelerator.device)
        size = arguments.per_device_train_batch_size
        stage.annealing.prepare(first_batches(data, size, accelerator.device))

    # What trains, at which rate. Weight decay leaves λ, α and maps alone.
    decayed = set(Trainer.get_decay_parameter_names(None, stage.model))
    groups = stage.parameter_groups(stage.model, arguments.learning_rate, arguments.weight_decay, decayed)
    optimizer_class, optimizer_options = Trainer.get_optimizer_cls_and_kwargs(arguments, stage.model)
    optimizer = optimizer_class(groups, **optimizer_options)
    model, optimizer, loader = accelerator.prepare(stage.model, optimizer, loader)
    parts = arguments.gradient_accumulation_steps
    # How many steps there are in streamed data, only its end can tell.
    per_epoch = None if config.data.streaming else -(-len(loader) // parts)
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(total),
        total,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or {},
    )
    scheduler = accelerator.prepare(scheduler)

    step = resume(accelerator, final.parent)
    random_state = torch.get_rng_state() if step else None
    losses: list[float] = []
    for chunk in islice(steps_from(loader, parts, step, per_epoch), max(total - step, 0)):
        if random_state is not None:
            # Going through the data again to where it stopped has drawn from it.
            torch.set_rng_state(random_state)
            random_state = None
        if stage.annealing is not None:
            stage.annealing.apply(step, total)
        loss = train_step(accelerator, stage, model, chunk)
        if not torch.isfinite(loss):
            raise ValueError(f"stage {name!r}: the loss is {float(loss)} at step {step + 1}")
        if arguments.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        losses.append(float(loss))
        if step % max(int(arguments.logging_steps), 1) == 0:
            means = "  ".join(f"{key} {value:.4f}" for key, value in attention_means(student).items())
            accelerator.print(f"{name} {step}/{total}  loss {loss:.5f}  {means}")
        if step % max(int(arguments.save_steps), 1) == 0:
            save(accelerator, final.parent, step, total)

    if stage.annealing is not None:
        stage.annealing.finish(total)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        final.parent.mkdir(parents=True, exist_ok=True)
        (final.parent / "losses.json").write_text(json.dumps(losses))
        beside = Source(config.model.student or config.model.teacher)
        save_checkpoint(stage.finish().to("cpu"), tokenizer, final, source=beside)
    accelerator.wait_for_everyone()
    accelerator.free_memory(model, optimizer)


def steps_from(loader, parts: int, first: int, per_epoch: int | None):
    """The batches of each step from step `first` on, again and again through the data.

    per_epoch: steps in the data; None: known when it ends, so that what comes before `first` is read and left out.
    """
    epoch = first // per_epoch if per_epoch else 0
    step = epoch * per_epoch if per_epoch else 0
    while True:
        loader.set_epoch(epoch)
        start = step
        if per_epoch and first > step:
            batches, step = iter(skip_first_batches(loader, (first - step) * parts)), first
        else:
            batches = iter(loader)
        while chunk := list(islice(batches, parts)):
            if step >= first:
                yield chunk
            step += 1
        if step == start:
            raise ValueError(f"train_data gave no row in epoch {epoch + 1}")
        epoch += 1


def train_step(accelerator, stage: Stage, model, batches: list[dict]) -> torch.Tensor:
    """Forward and backward of all parts of one step; returns its loss, the mean over all processes."""
    model.train()
    num_items = None
    if stage.counts_items:
        labels = [batch["labels"][..., 1:] if stage.task == "causal-lm" else batch["labels"] for batch in batches]
        num_items = accelerator.reduce(sum((part != -100).sum() for part in labels), "sum")
    total = 0.0
    for number, batch in enumerate(batches):
        with nullcontext() if number == len(batches) - 1 else accelerator.no_sync(model):
            loss, _ = stage.loss(model, batch, num_items)
            # DDP takes the mean over processes; a counted loss is already this part's share of the whole.
            loss = loss * accelerator.num_processes if num_items is not None else loss / len(batches)
            accelerator.backward(loss)
        total = total + loss.detach()
    return accelerator.reduce(total, "mean")


def save(accelerator, folder: Path, step: int, total: int) -> None:
    """folder/state-N, with a file that is written last and says that it is complete; older ones go."""
    accelerator.save_state(str(folder / f"state-{step}"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / f"state-{step}" / "done.json").write_text(json.dumps({"step": step, "total": total}))
        for older in folder.glob("state-*"):
            if older.name != f"state-{step}":
                shutil.rmtree(older)


def resume(accelerator, folder: Path) -> int:
    """Load the last complete state, if there is one; returns the steps it holds."""
    steps = [int(path.parent.name.split("-")[1]) for path in folder.glob("state-*/done.json")]
    if steps:
        accelerator.load_state(str(folder / f"state-{max(steps)}"))
    return max(steps, default=0)


def batch_to(batch: dict, device) -> dict:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


if __name__ == "__main__":
    main()
