"""The callback's numbers are those of `measure`, and training goes on as if it were not there."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from distattn_hf import AttentionLoggingCallback, DistAttnConfig, convert
from distattn_hf.analysis.statistics import measure
from tests.conversion.models import VOCAB, gpt2, t5


def rows(count: int = 8, length: int = 12) -> list[dict]:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, callbacks=(), kind=Trainer, **options):
    arguments = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "use_cpu": True}
    arguments |= {"per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    return kind(
        model, TrainingArguments(str(folder), **arguments | options), train_dataset=rows(), callbacks=list(callbacks)
    )


def student():
    return convert(gpt2(attn_pdrop=0.1, resid_pdrop=0.1), "l2", init="plain")


@pytest.mark.parametrize("added", [True, False])
def test_numbers_of_each_layer_reach_the_log(added, tmp_path):
    model, callback = student(), AttentionLoggingCallback(every=2, rows=1)
    run = trainer(model, tmp_path, [] if added else [callback])
    if added:
        callback.add_to(run)
    run.train()
    logged = [entry for entry in run.state.log_history if "attention/h.0.attn/entropy" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    names = {"entropy", "maximum", "collapsed", "lambda"}
    for layer in ("h.0.attn", "h.1.attn"):
        assert {name.rpartition("/")[2] for name in logged[1] if f"/{layer}/" in name} == names
    # The last look is at the model as it is now, on the last batch: of one row, which of the eight it was is open.
    heads = [measure(model.eval(), [{"input_ids": row["input_ids"][None]}]).of("h.0.attn") for row in rows()]
    means = {round(sum(head.entropy for head in each) / len(each), 6) for each in heads}
    assert logged[1]["attention/h.0.attn/entropy"] in means
    assert len(means) == 8


def test_training_is_the_same_with_and_without(tmp_path):
    """Dropout's random numbers included, and the model's mode."""
    weights = []
    for callbacks in ([], [AttentionLoggingCallback(every=1)]):
        model = student()
        trainer(model, tmp_path, callbacks).train()
        assert model.training
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())


def test_a_collapsed_head_is_warned_of_once(tmp_path, caplog):
    model = student()
    with torch.no_grad():
        model.attention_states["h.1.attn"].groups[0].log_lambda[2] = 9.0
    with caplog.at_level(logging.WARNING, logger="distattn_hf"):
        trainer(model, tmp_path, [AttentionLoggingCallback(every=1)]).train()
    said = [record.getMessage() for record in caplog.records if "has collapsed" in record.getMessage()]
    assert sum("head 2 of h.1.attn" in text for text in said) == 1
    assert "learning_rates.attention" in said[0]


def test_what_it_does_not_reach_is_said(tmp_path, caplog):
    arguments = TrainingArguments(str(tmp_path), report_to=["tensorboard"], use_cpu=True)
    with caplog.at_level(logging.WARNING, logger="distattn_hf"):
        AttentionLoggingCallback().on_train_begin(arguments, None, None)
        assert "add_to(trainer) adds tensorboard" in caplog.text
        caplog.clear()
        added = AttentionLoggingCallback().add_to(trainer(gpt2(), tmp_path))
        added.on_train_begin(arguments, None, None)
        assert not caplog.text


def test_native_and_untouched_models_and_accumulated_steps(tmp_path):
    config = DistAttnConfig(
        mechanism="l1", is_decoder=True, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    for model, name, has_lambda in (
        (AutoModelForCausalLM.from_config(config), "layers.0.self_attn", True),
        (gpt2(), "h.0.attn", False),
    ):
        run = trainer(model, tmp_path, [AttentionLoggingCallback(every=1)], gradient_accumulation_steps=2, max_steps=1)
        run.train()
        logged = [entry for entry in run.state.log_history if f"attention/{name}/maximum" in entry]
        assert len(logged) == 1
        assert (f"attention/{name}/lambda" in logged[0]) == has_lambda


class ByPosition(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(inputs["input_ids"], labels=inputs["labels"])
        return (output.loss, output) if return_outputs else output.loss


def also(**entries) -> list[dict]:
    return [{**row, **entries} for row in rows()]


def embedded() -> list[dict]:
    return [{"inputs_embeds": torch.randn(12, 32), "labels": row["labels"]} for row in rows()]


@pytest.mark.parametrize(
    ("make", "data", "kind"),
    [
        (gpt2, also(attention_mask=torch.ones(1, 12, 12).tril().bool()), Trainer),
        (gpt2, embedded(), Trainer),
        (t5, rows(), Trainer),  # the decoder reads the labels
        (gpt2, rows(), ByPosition),
    ],
    ids=["4-D mask", "embeddings", "labels alone", "by position"],
)
def test_whatever_the_model_is_called_with(make, data, kind, tmp_path):
    """rows and tokens below the batch's: what is cut fits together."""
    model = convert(make(), "l2", init="plain")
    run = trainer(model, tmp_path, [AttentionLoggingCallback(1, rows=1, tokens=8)], max_steps=1, kind=kind)
    run.train_dataset = data
    run.train()
    entropies = [value for name, value in run.state.log_history[0].items() if name.endswith("/entropy")]
    assert len(entropies) == len(model.attention_states)
    assert min(entropies) > 0


def test_of_texts_padded_on_the_left_the_end_is_looked_at(tmp_path):
    run = trainer(student(), tmp_path, [AttentionLoggingCallback(1, tokens=8)], max_steps=1)
    run.train_dataset = also(attention_mask=torch.tensor([0] * 9 + [1] * 3))
    run.train()
    assert run.state.log_history[0]["attention/h.0.attn/entropy"] > 0.1


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        AttentionLoggingCallback(every=0)
