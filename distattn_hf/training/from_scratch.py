"""`train`: a model of the native family from scratch, resumable, with its scores on held-out text."""

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from ..data.datasets import build_data, check_data
from ..data.rows import training_texts
from ..data.sources import find_data
from ..data.tokenizer import byte_level_bpe
from ..evaluation.scorecard import METRICS, score_model
from ..storage.folders import save_checkpoint, write_json
from ..storage.runs import check_space
from .arguments_scratch import ScratchConfig
from .stages import Stage, StageOptions
from .trainer import AdaptationTrainer

SCORES = "scores.json"
_ARGUMENTS = "arguments.json"
_AUTO = {"causal-lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
# What may differ between a run and the one it goes on from.
_MAY_CHANGE = {
    "output_dir", "disable_tqdm", "report_to", "logging_steps", "save_steps", "save_strategy", "save_total_limit",
    "use_cpu", "per_device_eval_batch_size", "num_proc", "dataloader_num_workers",
}  # fmt: skip


def train_from_scratch(config: ScratchConfig) -> dict:
    """Train, save output_dir/final (model and tokenizer) and output_dir/scores.json, and return the scores.

    Returns {"task", "parameters", "tokens", "seconds", "scores": {"loss", "accuracy", "perplexity"}, "curve": [[step,
    training loss], ...], "evaluation": [[step, held-out loss], ...]}. A run that was cut off goes on from its last
    checkpoint; one that is finished is not done again.

    Raises:
        ValueError: bad input, or an output_dir with a run of other arguments; a loss that is not finite.
        OSError: where a checkpoint finds no space.
    """
    out, state = Path(config.training.output_dir), PartialState(cpu=config.training.use_cpu)
    _check_arguments(config, out)
    if (out / SCORES).is_file():
        return json.loads((out / SCORES).read_text(encoding="utf-8"))
    if find_data(config.data)[1] is None:
        raise ValueError("eval_data must be given: the data has no split to evaluate on")
    with state.main_process_first():
        tokenizer = _tokenizer(config, out, state)
    model = _new_model(config, tokenizer)
    data = build_data(config.data, config.scratch.task, tokenizer, model.config)
    check_data("train_data", data.train)
    trainer = AdaptationTrainer(
        Stage("task", model, None, config.scratch.task, StageOptions()),
        config.training,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _ARGUMENTS, _plain(config.values))
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
        check_space(out / "final", model, with_optimizer=False)
        save_checkpoint(model.to("cpu"), tokenizer, out / "final", overwrite=True)
        write_json(out / SCORES, result)
    trainer.accelerator.wait_for_everyone()
    return result or json.loads((out / SCORES).read_text(encoding="utf-8"))


def _plain(values: dict) -> dict:
    return json.loads(json.dumps(values, default=str))


def _check_arguments(config: ScratchConfig, out: Path) -> None:
    """Raise `ValueError` where output_dir holds a run with other arguments."""
    file, values = out / _ARGUMENTS, _plain(config.values)
    # Where nothing came of a run, its arguments (a typo in them, perhaps) bind no one.
    if not file.is_file() or all(path.name in (_ARGUMENTS, "tokenizer") for path in out.iterdir()):
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = {k for k in {*before, *values} - _MAY_CHANGE if before.get(k) != values.get(k)}
    if changed:
        key = min(changed)
        raise ValueError(
            f"output_dir {str(out)!r} holds a run with {key}={before.get(key)!r}, now {values.get(key)!r} "
            f"({len(changed)} arguments differ); give another output_dir or remove that one"
        )


def _tokenizer(config: ScratchConfig, out: Path, state):
    """The tokenizer; one that is learned is kept in output_dir/tokenizer, so that all processes and a resumed run have
    the same."""
    wanted, folder = config.scratch.tokenizer, out / "tokenizer"
    if isinstance(wanted, dict):
        # What it was learned from stands beside it: a run that failed before may have had other data.
        source = {**_plain(wanted), "task": config.scratch.task, **_plain(asdict(config.data))}
        noted = folder / "learned_from.json"
        known = noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) == source
        if state.is_main_process and not known:
            texts = training_texts(find_data(config.data)[0], config.data, config.scratch.task)
            tokenizer = byte_level_bpe(texts, wanted["vocab_size"], add_end=config.scratch.task == "seq2seq")
            tokenizer.save_pretrained(folder)
            write_json(noted, source)
        wanted = str(folder)
    return AutoTokenizer.from_pretrained(wanted)


def _new_model(config: ScratchConfig, tokenizer):
    """The model with its initial weights, by the seed."""
    decided = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    decided |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if config.scratch.task == "seq2seq":
        decided["decoder_start_token_id"] = tokenizer.pad_token_id
    set_seed(config.training.seed)
    return _AUTO[config.scratch.task].from_config(config.scratch.model_config(**decided))


def summary(result: dict) -> str:
    """One line on a finished training."""
    metric = METRICS[result["task"]][0]
    return (
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens in {result['seconds']:,.0f} s: held-out "
        f"{metric} {result['scores'][metric]:.4f}, loss {result['scores']['loss']:.4f}"
    )
