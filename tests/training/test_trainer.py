"""`AdaptationTrainer`: the right parameters move, `TrainingArguments` works as ever, and trouble is named."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertModel, GPT2Config, GPT2LMHeadModel, TrainingArguments

from distattn_hf import AttentionSpec, convert
from distattn_hf.data.datasets import check_data, check_tokenizers
from distattn_hf.storage import runs as checkpoints
from distattn_hf.training.stages import Stage, StageOptions, check_pair
from distattn_hf.training.trainer import AdaptationTrainer, NonFiniteLossError
from tests.conversion.models import CLASSIFIER, FAMILIES, VOCAB, bert, gpt2, llama, t5
from tests.training.rows import collate, rows

TASK = {"gpt2": "causal-lm", "llama": "causal-lm", "bert": "masked-lm", "t5": "seq2seq"}


def plain(model, metric="l2"):
    return convert(model, AttentionSpec(metric, transform="scalar"), init="plain")


def quiet(model):
    """Without dropout, for comparisons."""
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout_rate",
                 "hidden_dropout_prob", "attention_probs_dropout_prob"):  # fmt: skip
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return type(model)(model.config).eval()


def trainer(folder, stage="transfer", family="llama", task=None, model=None, options=None, data=None, **kwargs):
    torch.manual_seed(0)
    teacher = model or FAMILIES[family]()
    task = task or TASK[family]
    options = StageOptions(**{"learning_rates": {"attention": 1e-2}, **(options or {})})
    stage = Stage(stage, plain(teacher), teacher, task, options)
    chosen = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "seed": 0, "logging_steps": 1, **kwargs,
    }  # fmt: skip
    data = rows(task) if data is None else data
    return AdaptationTrainer(
        stage, TrainingArguments(str(folder), **chosen), train_dataset=data, eval_dataset=rows(task, 8, seed=9),
        data_collator=collate,
    )  # fmt: skip


def losses(found):
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def moved(found, before):
    return {name for name, tensor in found.stage.student.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("stage", "train"), [("transfer", "attention"), ("transfer", "attention+qk"), ("distillation", "attention+qk"),
                         ("task", "attention")],
)  # fmt: skip
def test_what_trains_moves_and_nothing_else(tmp_path, family, stage, train):
    teacher = FAMILIES[family]()
    theirs = snapshot(teacher)
    found = trainer(tmp_path, stage, family, model=teacher, options={"train": train})
    before = snapshot(found.stage.student)
    found.train()
    names = moved(found, before)
    marks = (".distattn.", ".q", ".k", "c_attn") if train == "attention+qk" else (".distattn.",)
    assert any(".distattn." in name for name in names)
    assert all(any(mark in name for mark in marks) for name in names)
    assert any(".distattn." not in name for name in names) == (train == "attention+qk")
    assert all(torch.equal(theirs[name], p) for name, p in teacher.named_parameters())


def test_transfer_learns_and_logs_lambda_and_alpha(tmp_path):
    found = trainer(tmp_path, max_steps=30)
    before = found.evaluate()["eval_loss"]
    found.train()
    assert found.evaluate()["eval_loss"] < 0.7 * before
    logged = [entry for entry in found.state.log_history if "loss" in entry][-1]
    group = found.stage.student.attention_states["layers.0.self_attn"].groups[0]
    other = found.stage.student.attention_states["layers.1.self_attn"].groups[0]
    pair = [torch.cat([getattr(g, n).detach() for g in (group, other)]) for n in ("log_lambda", "log_alpha")]
    means = [float(values.exp().mean()) for values in pair]
    assert [logged["lambda/l2"], logged["alpha/l2"]] == pytest.approx(means, rel=1e-4)


def test_parameter_groups(tmp_path):
    options = {"train": "all", "learning_rates": {"attention": 0.02, "qk": 0.003}}
    found = trainer(tmp_path, "distillation", options=options, weight_decay=0.1)
    groups = {group["name"]: group for group in found.create_optimizer().param_groups}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "attention": (0.02, 0.0), "qk": (0.003, 0.1), "rest": (1e-3, 0.1), "rest (no decay)": (1e-3, 0.0),
    }  # fmt: skip
    counts = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    # Two layers, four heads of 8, λ + α + shift; keys for two heads; norms of width 32.
    assert counts["attention"] == 2 * 4 * (1 + 1 + 8)
    assert counts["qk"] == 2 * 32 * (32 + 16)
    assert counts["rest (no decay)"] == 5 * 32
    assert sum(counts.values()) == found.stage.trained_parameters()


def test_weight_decay_leaves_lambda_alone(tmp_path):
    found = trainer(tmp_path, "task", options={"learning_rates": {"attention": 0.0}}, weight_decay=0.5)
    before = snapshot(found.stage.student)
    found.train()
    assert not any(".distattn." in name for name in moved(found, before))


def test_annealing_reaches_its_target(tmp_path):
    found = trainer(tmp_path, max_steps=5, options={"anneal": {"alpha": 0.5, "hold": 0.0}})
    found.train()
    alphas = [entry["alpha/l2"] for entry in found.state.log_history if "alpha/l2" in entry]
    # A step that is logged had the value of its beginning.
    assert alphas == pytest.approx([0.5 ** (step / 5) for step in range(5)], rel=1e-4)
    for state in found.stage.student.attention_states.values():
        torch.testing.assert_close(state.groups[0].log_alpha.exp(), torch.full((4,), 0.5))


@pytest.mark.parametrize(("family", "stage"), [("bert", "transfer"), ("llama", "distillation"), ("bert", "task"),
                                               ("t5", "task"), ("llama", "task")])  # fmt: skip
def test_parts_of_a_step_are_one_step(tmp_path, family, stage):
    """4 rows in 4 parts train as 4 rows at once: same losses, same weights."""
    results = []
    for size, parts in ((4, 1), (1, 4)):
        found = trainer(
            tmp_path, stage, family, model=quiet(FAMILIES[family]()), per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, train_sampling_strategy="sequential",
        )  # fmt: skip
        found.train()
        results.append((losses(found), snapshot(found.stage.student)))
    # float32 sums in another order; Adam's first steps are signs, and turn a tiny gradient's rounding into a whole one.
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-4)
    for name, expected in results[0][1].items():
        assert float((results[1][1][name] - expected).abs().mean()) < 1e-4, name


@pytest.mark.parametrize("stage", ["transfer", "distillation", "task"])
def test_gradient_checkpointing_changes_nothing(tmp_path, stage):
    runs = []
    for checkpointing in (False, True):
        found = trainer(tmp_path, stage, model=quiet(llama()), activation_checkpointing=checkpointing)
        found.train()
        runs.append((losses(found), snapshot(found.stage.student)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, expected in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["transfer", "distillation", "task"])
def test_bfloat16(tmp_path, stage):
    exact = trainer(tmp_path, stage, model=quiet(llama()))
    half = trainer(tmp_path, stage, model=quiet(llama()), bf16=True)
    exact.train()
    half.train()
    # bfloat16 rounds by 0.4%; errors are squared differences of outputs of that precision.
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)
    assert losses(half) != losses(exact)
    assert all(p.dtype == torch.float32 for p in half.stage.student.parameters())


def test_saving_evaluating_and_the_best_model(tmp_path):
    found = trainer(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    found.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == [f"checkpoint-{found.state.best_global_step}"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / left[0])
    assert type(again) is type(found.stage.student)
    assert sum("eval_loss" in entry for entry in found.state.log_history) == 3


@pytest.mark.parametrize(("stage", "train"), [("transfer", "attention"), ("distillation", "all"), ("task", "lora")])
def test_resuming_gives_the_same_weights(tmp_path, stage, train):
    options = {"train": train, "anneal": {"alpha": 0.7}, "dropout": True}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "a", stage, "gpt2", options=options, **saving)
    whole.train()
    again = trainer(tmp_path / "b", stage, "gpt2", options=options, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    one, other = (snapshot(t.stage.finish()) for t in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_and_attention_are_saved_together_and_merged(tmp_path):
    found = trainer(tmp_path, "task", options={"train": "lora"}, save_strategy="steps", save_steps=4)
    before = snapshot(found.stage.student)
    found.train()
    folder = tmp_path / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").exists()
    saved = load_file(folder / "distattn_parameters.safetensors")
    assert len(saved) == 6
    # λ, α and shift train beside the adapters.
    assert all(not torch.equal(tensor, before[name]) for name, tensor in saved.items())
    batch = {k: v for k, v in collate(rows("causal-lm", 2)).items() if k != "labels"}
    expected = found.model.eval()(**batch).logits
    student = found.stage.finish()
    torch.testing.assert_close(student(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert snapshot(student).keys() >= {name.replace(".base_layer", "") for name in before if "lora" not in name}


def test_an_encoder_distils_and_a_classifier_trains(tmp_path):
    teacher = quiet(bert(BertModel))
    encoder = trainer(tmp_path, "distillation", "bert", "embedding", model=teacher, max_steps=20)
    before = encoder.evaluate()["eval_loss"]
    encoder.train()
    assert encoder.evaluate()["eval_loss"] < before
    assert not any(p.requires_grad for n, p in encoder.stage.student.named_parameters() if "pooler" in n)
    task = "sequence-classification"
    classifier = trainer(tmp_path, "task", "bert", task, model=bert(CLASSIFIER, num_labels=2), max_steps=3)
    classifier.train()
    assert classifier.evaluate()["eval_loss"] > 0


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    found = trainer(tmp_path, "distillation", max_steps=6, save_strategy="steps", save_steps=2)
    original, before = found.stage.objective, {}

    def poisoned(model, inputs, num_items=None):
        loss, output = original(model, inputs, num_items)
        if found.state.global_step == 3:
            before.update(snapshot(found.stage.student))
            loss = loss * float("nan")
        return loss, output

    found.stage.objective = poisoned
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 4; the last good .* is '.*checkpoint-2'"):
        found.train()
    assert not moved(found, before)
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"


def test_nan_before_any_checkpoint(tmp_path):
    found = trainer(tmp_path, "distillation")
    found.stage.objective = lambda model, inputs, items: (model(**inputs).loss * float("inf"), None)
    with pytest.raises(ValueError, match="loss is inf at step 1; no checkpoint was saved before"):
        found.train()


def test_no_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    found = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    real = checkpoints.shutil.disk_usage

    def usage(path):
        free = real(path).free if found.state.global_step < 4 else 1000
        return type(real(path))(10**9, 10**9, free)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    with pytest.raises(OSError, match=r"no space for checkpoint '.*checkpoint-4'.*last good checkpoint .*checkpoint-2"):
        found.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_that_fills_up_while_writing_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    found = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AdaptationTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"No space left on device; the last good checkpoint is '.*checkpoint-2'"):
        found.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_that_was_cut_off_is_not_one(tmp_path):
    found = trainer(tmp_path, save_strategy="steps", save_steps=2)
    found.train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-junk").mkdir()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"
    assert checkpoints.last_checkpoint(tmp_path / "none") is None


def test_space_needed_is_about_what_a_checkpoint_takes(tmp_path):
    found = trainer(tmp_path, "task", save_strategy="steps", save_steps=4)
    found.train()
    files = [p for p in (tmp_path / "checkpoint-4").rglob("*") if p.suffix in (".safetensors", ".pt")]
    taken = sum(p.stat().st_size for p in files)
    estimate = checkpoints.space_needed(found.model) - checkpoints._MARGIN
    # The files also hold names, steps and random states.
    assert taken < estimate + 100_000
    assert estimate < 1.2 * taken


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (lambda: bert(), "different families: BertForMaskedLM .model_type 'bert'. and DistAttnGPT2LMHeadModel"),
        (lambda: gpt2(CLASSIFIER2), "teacher must be a GPT2LMHeadModel"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=VOCAB)),
         r"differ in size: 'transformer.wte.weight' is \(64, 64\) in the teacher and \(64, 32\)"),
        (lambda: deeper(), r"differ in size: 'transformer.h.2.ln_1.weight' is \(32,\) in the teacher and None"),
    ],
)  # fmt: skip
def test_teacher_and_student_must_be_a_pair(teacher, said):
    with pytest.raises(ValueError, match=said):
        check_pair(teacher(), plain(gpt2()))
    check_pair(gpt2(), plain(gpt2()))


def deeper():
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=VOCAB, n_positions=128))


def CLASSIFIER2(config):  # noqa: N802
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(config)


def test_a_student_that_is_not_converted():
    with pytest.raises(ValueError, match="student must be a converted model, got T5ForConditionalGeneration"):
        check_pair(t5(), t5())


def test_tokenizers(tmp_path):
    from transformers import AutoTokenizer

    from tests.training.rows import checkpoint

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(tmp_path, gpt2()))
    check_tokenizers(gpt2(), tokenizer, tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["extra"])
    with pytest.raises(ValueError, match=r"different vocabularies \(64 and 65 tokens\): 'extra' is None and 64"):
        check_tokenizers(gpt2(), tokenizer, other)
    with pytest.raises(ValueError, match="tokenizer has 65 tokens but GPT2LMHeadModel embeds 64"):
        check_tokenizers(gpt2(), other)


def test_empty_data(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer(tmp_path, data=[])
    with pytest.raises(ValueError, match="train_data is empty"):
        check_data("train_data", iter(()))
    with pytest.raises(ValueError, match="train_data must be a data set, got None"):
        check_data("train_data", None)


def test_label_smoothing_is_for_the_task(tmp_path):
    found = trainer(tmp_path, "task", label_smoothing_factor=0.1)
    found.train()
    bare = trainer(tmp_path, "task")
    bare.train()
    assert losses(found)[0] != pytest.approx(losses(bare)[0], rel=1e-4)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 is for stage 'task'"):
        trainer(tmp_path, "distillation", label_smoothing_factor=0.1)


def test_stages_that_make_no_sense():
    with pytest.raises(ValueError, match="stage 'task' needs a head with a loss"):
        Stage("task", plain(bert(BertModel)), None, "embedding", StageOptions())
    with pytest.raises(ValueError, match="stage must be one of transfer, distillation, task, got 'warm'"):
        Stage("warm", plain(gpt2()), None, "causal-lm", StageOptions())


def test_seconds_are_kept_with_a_checkpoint(tmp_path):
    found = trainer(tmp_path, save_strategy="steps", save_steps=2)
    found.train()
    first = float((tmp_path / "checkpoint-2" / "seconds.txt").read_text())
    assert 0 < first < float((tmp_path / "checkpoint-4" / "seconds.txt").read_text()) <= found.seconds
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
