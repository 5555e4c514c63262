"""What scripts/adapt_accelerate.py takes beside Accelerate: the steps of a training, and going on where it stopped."""

import math
from itertools import islice
from pathlib import Path

import torch
from accelerate import skip_first_batches
from transformers import TrainerState

from ..storage.runs import LOOP_STATE, last_checkpoint, remove_checkpoints

# What the loop does as TrainingArguments says, and what changes nothing that is trained or saved at the end.
HONOURED = {
    "output_dir", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "optim",
    "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "use_cpu", "tf32", "activation_checkpointing", "gradient_checkpointing", "logging_steps", "save_steps",
    "save_total_limit", "per_device_eval_batch_size", "report_to", "run_name", "disable_tqdm", "log_level",
}  # fmt: skip
# Of each train_sampling_strategy, whether the rows are shuffled.
ORDERS = {"random": True, "sequential": False}


def count_steps(arguments, batches: int) -> int:
    """Return the optimizer steps of a training whose loader yields so many batches an epoch."""
    an_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)


class LoopSteps:
    """The steps of one training: which are left, their losses, and a checkpoint every `save_steps`.

    Made after `accelerator.prepare`, as it loads the last checkpoint in `arguments.output_dir` into what was prepared.
    """

    def __init__(self, accelerator, arguments, total: int):
        self.accelerator, self.arguments = accelerator, arguments
        self.folder = Path(arguments.output_dir)
        self.state, self.random_state = TrainerState(max_steps=total), None
        if checkpoint := last_checkpoint(self.folder, LOOP_STATE):
            accelerator.load_state(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / LOOP_STATE))
            # With another number of processes the same epochs are another number of steps.
            self.state.max_steps = total
            self.random_state = torch.get_rng_state()

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [entry["loss"] for entry in self.state.log_history]

    def left(self, loader):
        """Yield (number, batches) of each step that is left."""
        first, parts = self.state.global_step, self.arguments.gradient_accumulation_steps
        left = islice(batches_from(loader, parts, first), self.state.max_steps - first)
        for step, batches in enumerate(left, first):
            if self.random_state is not None:
                # Going through the data again to where it stopped has drawn from it.
                torch.set_rng_state(self.random_state)
                self.random_state = None
            yield step, batches

    def note(self, loss: torch.Tensor, stage: str) -> None:
        """Count a step and keep its loss; raises `ValueError` for one that is not finite."""
        self.state.global_step += 1
        if not torch.isfinite(loss):
            raise ValueError(f"stage {stage!r}: the loss is {float(loss)} at step {self.state.global_step}")
        self.state.log_history.append({"loss": float(loss)})

    def due(self, name: str) -> bool:
        """Return whether the step that was noted last is one of every `name` ("logging_steps", "save_steps")."""
        return self.state.global_step % max(int(getattr(self.arguments, name)), 1) == 0

    def save(self) -> None:
        """Write a checkpoint and remove the one before it."""
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        self.accelerator.save_state(str(checkpoint))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            # Last, as it says that the checkpoint is complete.
            self.state.save_to_json(str(checkpoint / LOOP_STATE))
            remove_checkpoints(self.folder, keep=checkpoint)


def batches_from(loader, parts: int, step: int):
    """Yield the batches of each step from `step` on, again and again through the data."""
    while True:
        epoch, done = divmod(step, math.ceil(len(loader) / parts))
        loader.set_epoch(epoch)
        batches = iter(skip_first_batches(loader, done * parts) if done else loader)
        while chunk := list(islice(batches, parts)):
            yield chunk
            step += 1
