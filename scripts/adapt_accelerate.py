"""The stages of `distattn adapt` as a plain Accelerate loop, to read and to change.

accelerate launch scripts/adapt_accelerate.py configs/training/minilm_l1.yaml [key=value ...]

Same YAML, same losses, same run folder as `distattn adapt`; no scorecard and no evaluation, and what it does not do of
TrainingArguments is refused. Run it again to go on where it stopped.
"""

import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from distattn_hf.data.datasets import row_length
from distattn_hf.data.tasks import TASKS
from distattn_hf.storage.folders import write_json
from distattn_hf.storage.models import load_checkpoint
from distattn_hf.storage.runs import LOOP_STATE, finished, remove_checkpoints
from distattn_hf.training.adapt import load_inputs, open_run
from distattn_hf.training.arguments import read_config, refuse_others
from distattn_hf.training.first_student import first_student
from distattn_hf.training.plain_loop import HONOURED, ORDERS, LoopSteps, count_steps
from distattn_hf.training.stages import Stage, attention_means, check_stages


def main() -> None:
    """Convert, then run the stages one after another."""
    config = read_config(sys.argv[1], sys.argv[2:])
    refuse_others(config, HONOURED, ORDERS)
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
    with accelerator.main_process_first():
        teacher, tokenizer, task, data = load_inputs(config)
    run = open_run(config, accelerator, LOOP_STATE)
    run.note()

    start = run.part("calibrated")
    if accelerator.is_main_process and not finished(start):
        run.save(first_student(config, teacher, tokenizer, data), tokenizer, start)
    accelerator.wait_for_everyone()
    options = {name: config.adaptation.options_for(name) for name in stages}
    length = row_length(config.data, tokenizer, teacher.config)
    check_stages(load_checkpoint(start)[0], teacher, task, options, length)

    for name, arguments in stages.items():
        if not finished(run.part(name)):
            student = load_checkpoint(start)[0]
            set_seed(arguments.seed)
            recompute = arguments.activation_checkpointing
            stage = Stage(name, student, teacher, task, options[name], recompute=recompute)
            if recompute and name != "transfer":
                stage.model.activation_checkpointing_enable()
            losses = train(accelerator, stage, arguments, data)
            if accelerator.is_main_process:
                run.save(stage.finish(), tokenizer, run.part(name))
                write_json(run.path / name / "losses.json", losses)
                remove_checkpoints(run.path / name)
            accelerator.wait_for_everyone()
        start = run.part(name)
    accelerator.print(f"saved to {start}")
    accelerator.end_training()


def train(accelerator, stage: Stage, arguments, data) -> list[float]:
    """Train one stage, on from its last checkpoint if there is one, and return the loss of each step."""
    size, shuffle = arguments.per_device_train_batch_size, ORDERS[arguments.train_sampling_strategy]
    stage.place(accelerator.device)
    stage.prepare(data, size, accelerator.device)
    loader = DataLoader(data.train, batch_size=size, shuffle=shuffle, collate_fn=data.collator)
    model, optimizer, loader = accelerator.prepare(stage.model, stage.make_optimizer(arguments), loader)
    total = count_steps(arguments, len(loader))
    warmup, options = arguments.get_warmup_steps(total), arguments.lr_scheduler_kwargs or {}
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, total, scheduler_specific_kwargs=options)
    schedule = accelerator.prepare(schedule)
    steps = LoopSteps(accelerator, arguments, total)
    for step, batches in steps.left(loader):
        if stage.annealing is not None:
            stage.annealing.apply(step, total)
        loss = train_step(accelerator, stage, model, batches)
        steps.note(loss, stage.name)
        if arguments.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if steps.due("logging_steps"):
            means = "  ".join(f"{key} {value:.4f}" for key, value in attention_means(stage.student).items())
            accelerator.print(f"{stage.name} {step + 1}/{total}  loss {float(loss):.5f}  {means}")
        if steps.due("save_steps"):
            steps.save()
    if stage.annealing is not None:
        stage.annealing.finish(total)
    accelerator.wait_for_everyone()
    accelerator.free_memory(model, optimizer)
    return steps.losses


def train_step(accelerator, stage: Stage, model, batches: list[dict]) -> torch.Tensor:
    """Run all parts of one step forward and backward; return its loss, the mean over all processes."""
    model.train()
    num_items, total = None, 0.0
    if stage.counts_items:
        labels = [batch["labels"][..., int(TASKS[stage.task].shifted) :] for batch in batches]
        num_items = accelerator.reduce(sum((part != -100).sum() for part in labels), "sum")
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            loss, _ = stage.loss(model, batch, num_items)
            # DDP takes the mean over processes; a counted loss is already this part's share of the whole.
            loss = loss * accelerator.num_processes if num_items is not None else loss / len(batches)
            accelerator.backward(loss)
        total = total + loss.detach()
    return accelerator.reduce(total, "mean")


if __name__ == "__main__":
    main()
