"""`train`: a model of the native family from scratch, resumable, with its scores on held-out text."""

import json
from dataclasses import asdict
from pathlib import Path

import transformers
from accelerate import PartialState
from transformers import AutoTokenizer, set_seed

from ..connection import hub_arguments
from ..data.datasets import build_data
from ..data.rows import training_texts
from ..data.sources import find_data
from ..data.tasks import TASKS
from ..data.tokenizer import byte_level_bpe
from ..evaluation.score import score_model
from ..storage.folders import write_json
from ..storage.runs import RunFolder
from .arguments_scratch import ScratchConfig
from .stages import Stage, StageOptions
from .trainer import AdaptationTrainer

SCORES = "scores.json"


def train_from_scratch(config: ScratchConfig) -> dict:
    """Train, save output_dir/final (model and tokenizer) and output_dir/scores.json, and return the scores.

    Returns {"task", "parameters", "tokens", "seconds", "scores": {"loss", "accuracy", "perplexity"}, "curve": [[step,
    training loss], ...], "evaluation": [[step, held-out loss], ...]}. An interrupted run resumes from its last
    checkpoint; a finished one is not run again.

    Raises:
        ValueError: bad input, or an output_dir with a run of other arguments; a loss that is not finite.
        OSError: no space for a checkpoint.
    """
    out, state = Path(config.training.output_dir), PartialState(cpu=config.training.use_cpu)
    run = RunFolder(out, config.values, state)
    run.check()
    if (out / SCORES).is_file():
        return json.loads((out / SCORES).read_text(encoding="utf-8"))
    if find_data(config.data)[1] is None:
        raise ValueError("eval_data must be given: the data has no split to evaluate on")
    with state.main_process_first():
        tokenizer = _tokenizer(config, out, state)
    model = _new_model(config, tokenizer)
    data = build_data(config.data, config.scratch.task, tokenizer, model.config)
    trainer = AdaptationTrainer(
        Stage("task", model, None, config.scratch.task, StageOptions()),
        config.training,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    run.note()
    if config.training.include_num_input_tokens_seen == "no":
        config.training.include_num_input_tokens_seen = "non_padding"
    trainer.train(resume_from_checkpoint=True)
    result = {}
    if trainer.is_world_process_zero():
        scores = score_model(
            model,
            config.scratch.task,
            data,
            tokenizer,
            batch_size=config.training.per_device_eval_batch_size,
            progress=not config.training.disable_tqdm,
        )
        history = trainer.state.log_history
        result = {
            "task": config.scratch.task,
            "parameters": model.num_parameters(),
            "tokens": int(trainer.state.num_input_tokens_seen),
            "seconds": round(trainer.seconds, 1),
            "scores": scores,
            "curve": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
            "evaluation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        }
        run.save(model, tokenizer, out / "final")
        write_json(out / SCORES, result)
    trainer.accelerator.wait_for_everyone()
    return result or json.loads((out / SCORES).read_text(encoding="utf-8"))


def _tokenizer(config: ScratchConfig, out: Path, state):
    """Return the tokenizer; a learned one is saved in output_dir/tokenizer, so that all processes and a resumed run use
    the same."""
    name_or_options, folder = config.scratch.tokenizer, out / "tokenizer"
    if isinstance(name_or_options, dict):
        # Its source is recorded beside it: an earlier run that failed may have had other data.
        source = json.loads(
            json.dumps({**name_or_options, "task": config.scratch.task, **asdict(config.data)}, default=str)
        )
        source_file = folder / "learned_from.json"
        up_to_date = source_file.is_file() and json.loads(source_file.read_text(encoding="utf-8")) == source
        if state.is_main_process and not up_to_date:
            texts = training_texts(find_data(config.data)[0], config.data, config.scratch.task)
            tokenizer = byte_level_bpe(texts, name_or_options["vocab_size"], add_end=config.scratch.task == "seq2seq")
            tokenizer.save_pretrained(folder)
            write_json(source_file, source)
        name_or_options = str(folder)
    return AutoTokenizer.from_pretrained(name_or_options, **hub_arguments(name_or_options))


def _new_model(config: ScratchConfig, tokenizer):
    """Return the model with its initial weights, drawn from the seed."""
    config_fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config_fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if config.scratch.task == "seq2seq":
        config_fields["decoder_start_token_id"] = tokenizer.pad_token_id
    set_seed(config.training.seed)
    auto_class = getattr(transformers, TASKS[config.scratch.task].auto_class)
    return auto_class.from_config(config.scratch.model_config(**config_fields))


def summary(result: dict) -> str:
    """Return one line that summarises a finished training."""
    metric = TASKS[result["task"]].metric
    return (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens in {result['seconds']:,.0f} s: held-out "
        f"{metric} {result['scores'][metric]:.4f}, loss {result['scores']['loss']:.4f}"
    )
