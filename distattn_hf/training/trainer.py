"""`AdaptationTrainer`: transformers' `Trainer` for one `Stage`, with checks before training starts."""

import errno
import gc
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.datasets import TaskData, check_data
from ..data.tasks import TASKS
from ..storage.runs import RunFolder, check_space, last_checkpoint
from .annealing import AnnealingCallback
from .stages import Stage, attention_means

_BESIDE_ADAPTER = "distattn_parameters.safetensors"
_SECONDS = "seconds.txt"


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; the optimizer made no step with it."""


def num_steps(arguments: TrainingArguments, dataset) -> int:
    """Return how many optimizer steps a training takes."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    rows = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return max(1, int(arguments.num_train_epochs * len(dataset) / rows))


class AdaptationTrainer(Trainer):
    """`Trainer` for one stage of an adaptation; all of `TrainingArguments` works as usual.

    Args:
        stage: defines the trainable parameters, the loss and the annealing. Its `model` is trained.
        args, and everything else: as in `Trainer`.

    Raises:
        ValueError: an empty data set; annealing or transfer under FSDP or DeepSpeed; during training, a loss that is
            not finite (`NonFiniteLossError`, with the step and the last good checkpoint).
        OSError: no space for a checkpoint, found before it is written; what was saved before stays.
    """

    def __init__(self, stage: Stage, args, *, train_dataset, callbacks=None, **kwargs):
        check_data("train_dataset", train_dataset)
        self.stage = stage
        if stage.name != "task" and args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} is for stage 'task'; set stage_options.task"
            )
        if stage.name == "transfer" and args.activation_checkpointing:
            # There is no graph through the model to save memory on; a layer's own intermediates can be recomputed.
            stage.objective.recompute = True
            args.activation_checkpointing = args.gradient_checkpointing = False
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process each with accelerate launch or torchrun"
            )
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # nothing to copy to, and torch would warn
        super().__init__(stage.model, args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        if stage.name == "transfer" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "stage 'transfer' takes a loss out of each layer's middle, where FSDP and DeepSpeed do not gather "
                "parameters for the backward pass; it needs little memory: run it by DDP (configs/accelerate)"
            )
        if stage.annealing is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("anneal sets parameters in place, which FSDP and DeepSpeed cut up; train without it")
            self.add_callback(AnnealingCallback(stage.annealing))
        stage.place(self.args.device)
        self._own_loss = stage.name == "task" and (
            self.label_smoother is not None or self.compute_loss_func is not None
        )
        if not self._own_loss:
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = stage.counts_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the stage's loss."""
        if self._own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.stage.loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages over processes, but each loss is already divided by the labels of the whole batch.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Log as `Trainer` does, with mean λ and α of each metric beside a loss."""
        if self.stage.converted and "loss" in logs:
            logs.update({name: round(value, 6) for name, value in attention_means(self.stage.student).items()})
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run a training step; raises `NonFiniteLossError` before the optimizer steps."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            raise NonFiniteLossError(
                f"stage {self.stage.name!r}: the loss is {float(loss)} at step {self.state.global_step + 1}; "
                f"{self._last_good()}. Lower the learning rate (learning_rates.attention first), or look at the data"
            )
        return loss

    def _last_good(self) -> str:
        checkpoint = last_checkpoint(self.args.output_dir)
        return f"the last good checkpoint is {str(checkpoint)!r}" if checkpoint else "no checkpoint was saved before"

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict as `Trainer` does; in transfer, and for encoders, there is only a loss."""
        if self._own_loss or self.stage.has_output:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        """Return transformers' choice of optimizer, with the stage's parameter groups."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not {"params", "model", "optimizer_dict"} & kwargs.keys():
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            kwargs["params"] = self.stage.parameter_groups(model, args.learning_rate, args.weight_decay, decayed)
        return optimizer, kwargs

    def announce(self, say, start) -> None:
        """Report that the stage begins from checkpoint `start` or resumes; a few steps later, how long it may take."""
        name, steps = Path(self.args.output_dir).name, num_steps(self.args, self.train_dataset)
        checkpoint = last_checkpoint(self.args.output_dir)
        if checkpoint is None:
            say(f"stage {name} begins: {steps:,} steps from {start}")
        else:
            remaining = steps - int(checkpoint.name.rpartition("-")[2])
            say(f"stage {name} goes on from {checkpoint}: {remaining:,} of {steps:,} steps are left")
        self.add_callback(_Estimate(name, steps, say))

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train as `Trainer` does; True resumes from the last complete checkpoint, if any, or else starts anew."""
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        self._started, self._seconds_before = time.perf_counter(), 0.0
        if resume_from_checkpoint:
            file = Path(resume_from_checkpoint) / _SECONDS
            self._seconds_before = float(file.read_text()) if file.is_file() else 0.0
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def seconds(self) -> float:
        """How long training has taken; of an interrupted run, up to the checkpoint it resumed from."""
        return self._seconds_before + time.perf_counter() - self._started

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = folder.exists()
        try:
            check_space(folder, self.model, with_optimizer=not self.args.save_only_model)
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (folder / _SECONDS).write_text(str(self.seconds), encoding="utf-8")
        except OSError as error:
            if self.args.should_save and not existed:
                shutil.rmtree(folder, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, f"{error.strerror or error}; {self._last_good()}") from error
            raise

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.stage.trains == "lora" and self.args.should_save:
            # peft saves the adapter alone.
            attention_parameters = {
                n: p.detach().contiguous() for n, p in self.stage.student.named_parameters() if ".distattn." in n
            }
            save_file(attention_parameters, os.path.join(output_dir or self.args.output_dir, _BESIDE_ADAPTER))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, _BESIDE_ADAPTER)
        if os.path.isfile(path):
            self.stage.student.load_state_dict(load_file(path), strict=False)


class _Estimate(TrainerCallback):
    """A callback that reports once how long a training may take, from the time of its first steps."""

    def __init__(self, name: str, steps: int, say, after: int = 3):
        self.name, self.steps, self.say, self.after = name, steps, say, after
        self.began = None

    def on_step_end(self, args, state, control, **kwargs):
        """Start the clock after the first step, which includes one-time work; report a few steps later."""
        if self.began is None:
            self.began = (state.global_step, time.perf_counter())
        elif state.global_step == self.began[0] + self.after:
            pace, left = (time.perf_counter() - self.began[1]) / self.after, self.steps - state.global_step
            if left > 0:
                self.say(
                    f"stage {self.name}: {pace:.2g} s a step, about {_duration(pace * left)} for the {left:,} left"
                )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def train_stage(stage: Stage, arguments, data: TaskData, tokenizer, run: RunFolder, before, say) -> None:
    """Train one stage from the checkpoint `before`, or resume its own last one, and save the trained student."""
    set_seed(arguments.seed)
    reads_text = TASKS[stage.task].inputs == "text"
    if not reads_text:
        # It would count numbers of pictures.
        arguments.include_num_input_tokens_seen = "no"
    trainer = AdaptationTrainer(
        stage,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    stage.prepare(data, arguments.per_device_train_batch_size, trainer.args.device)
    trained = stage.trained_parameters()
    trainer.announce(say, before)
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        spent = {"seconds": round(trainer.seconds, 1)}
        spent |= {"tokens": int(trainer.state.num_input_tokens_seen)} if reads_text else {}
        spent["trained_parameters"] = trained
        final = Path(arguments.output_dir) / "final"
        run.save(stage.finish(), tokenizer, final, spent=spent, before=Path(before))
    trainer.accelerator.wait_for_everyone()
    del trainer
    gc.collect()
