"""`adapt` from a configuration to a student with a scorecard, and that nothing is done twice."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertModel

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.convert import current_report
from distattn_hf.data.datasets import build_data
from distattn_hf.data.sources import read_texts
from distattn_hf.data.tasks import TASKS, task_of
from distattn_hf.evaluation import scorecard
from distattn_hf.evaluation.long_text_scores import score_questions
from distattn_hf.evaluation.score import score_model
from distattn_hf.evaluation.scorecard import Scorecard, no_attention, passkey_questions, without_far_field
from distattn_hf.storage.models import load_checkpoint
from distattn_hf.training import adapt as module
from distattn_hf.training.adapt import adapt
from distattn_hf.training.arguments import parse_config
from distattn_hf.training.trainer import AdaptationTrainer
from tests.conversion.models import CLASSIFIER, bert, gpt2, llama, t5
from tests.fixtures.load import GPT2_ENGLISH
from tests.training.rows import checkpoint, text_file, values


def test_it_says_what_it_does_and_keeps_what_resuming_needs(tmp_path, monkeypatch):
    given = values(tmp_path, gpt2(), stages=["transfer", "distillation"], max_steps=8, save_steps=2)
    said, out = [], tmp_path / "run"
    original = AdaptationTrainer.training_step

    def interrupted(trainer, *arguments, **options):
        if trainer.stage.name == "distillation" and trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return original(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(AdaptationTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapt(parse_config(given), say=said.append)
    assert any(line.startswith("conversion begins") for line in said)
    assert f"stage transfer begins: 8 steps from {out / 'calibrated'}" in said
    assert any(re.search(r"stage transfer: .* s a step, about .* for the 4 left", line) for line in said)
    assert not list((out / "transfer").glob("checkpoint-*"))
    assert (out / "distillation" / "checkpoint-4").is_dir()
    said.clear()
    adapt(parse_config(given), say=said.append)
    assert f"stage transfer is finished: {out / 'transfer' / 'final'}" in said
    assert any(re.fullmatch(r"stage distillation goes on from .*checkpoint-4: 4 of 8 steps are left", x) for x in said)
    assert not list(out.rglob("checkpoint-*")) + list(out.rglob("optimizer.pt"))


def test_stages_one_after_another(tmp_path, monkeypatch):
    given = values(
        tmp_path, llama(), stages=["transfer", "distillation", "task"], controls=["plain", "no_attention"],
        teacher_finetuned=True, max_steps=3,
    )  # fmt: skip
    card = adapt(parse_config(given))
    names = ["teacher", "teacher_finetuned", "plain", "calibrated", "transfer", "distillation", "task", "no_attention"]
    assert [row.name for row in card.rows] == names
    assert card.ratio_to == "teacher_finetuned"
    assert card.checkpoint == "task"
    base = card.row("teacher_finetuned")
    for row in card.rows:
        assert row.ratio == row.score / base.score
        assert row.score == row.metrics["perplexity"]
    # 4 rows of 16 tokens a step; the fine-tuned teacher gets as many steps as all stages together.
    assert [card.row(name).tokens for name in ("transfer", "distillation", "task")] == [192, 384, 576]
    assert base.tokens == 576
    # λ, α, ε and a shift of 8 numbers, of four heads in two layers.
    assert card.row("transfer").trained_parameters == 2 * 4 * 11
    assert card.row("teacher").tokens is None
    assert card.row("plain").score != card.row("calibrated").score
    saved = json.loads((tmp_path / "run" / "student" / "distattn_scorecard.json").read_text())
    assert saved == card.to_dict()
    assert Scorecard.from_dict(saved) == card
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "task" / "final").eval()
    ids = torch.tensor([[5, 9, 12]])
    assert torch.equal(student(ids).logits, last(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "student")) == 64
    table = card.table()
    assert all(name in table for name in names)

    def never(*arguments, **options):
        raise AssertionError("done again")

    for place, name in ((module, "train_stage"), (module, "first_student"), (scorecard, "score_model")):
        monkeypatch.setattr(place, name, never)
    again = adapt(parse_config({**given, "logging_steps": 5}))
    assert again.to_dict() == card.to_dict()
    with pytest.raises(ValueError, match="holds a run with learning_rate=0.001, now 0.002 .1 arguments differ"):
        adapt(parse_config({**given, "learning_rate": 2e-3}))


def test_folded_and_plain_distances_all_through(tmp_path):
    """α = 1 from the start, at the score of the student whose α is not folded, and still 1 after training."""
    given = values(tmp_path, llama(), stages=["transfer", "distillation"], max_steps=2, anneal={"alpha": 1.0})
    given["stage_options"] = {"transfer": {"train": "attention+qk"}}
    card = adapt(parse_config({**given, "fold_alpha": True}))
    beside = adapt(parse_config({**given, "output_dir": str(tmp_path / "beside"), "stages": ["transfer"]}))
    assert card.row("calibrated").score == pytest.approx(beside.row("calibrated").score, rel=1e-5)
    for name in ("calibrated", "student"):
        report = current_report(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name))
        assert report.mean_alpha == 1.0
    assert current_report(AutoModelForCausalLM.from_pretrained(tmp_path / "beside" / "calibrated")).mean_alpha != 1.0
    with pytest.raises(ValueError, match="its query projections are not the teacher's"):
        adapt(parse_config({**given, "fold_alpha": True, "output_dir": str(tmp_path / "x"), "stage_options": {}}))
    with pytest.raises(ValueError, match="fold_alpha=True needs spec"):
        parse_config({**given, "fold_alpha": True, "spec": None, "student": str(tmp_path / "run" / "student")})


def test_a_run_that_came_to_nothing_binds_no_other(tmp_path):
    given = values(tmp_path, gpt2(), stages=["transfer"], max_steps=1)
    with pytest.raises(ValueError, match="unknown metric 'l22'"):
        adapt(parse_config({**given, "spec": {**given["spec"], "metric": "l22"}}))
    assert adapt(parse_config(given)).row("transfer") is not None


def test_stages_may_be_added_at_the_end_alone(tmp_path):
    """What is finished was trained from the stages before it, so none may come between or before."""
    given = values(tmp_path, gpt2(), stages=["distillation"], max_steps=1)
    adapt(parse_config(given))
    for stages in (["transfer", "distillation"], ["task"]):
        said = f"holds a run with stages=['distillation'], to which stages may be added at the end, now {stages!r}"
        with pytest.raises(ValueError, match=re.escape(said)):
            adapt(parse_config({**given, "stages": stages}))
    assert not (tmp_path / "run" / "transfer").exists()
    card = adapt(parse_config({**given, "stages": ["distillation", "task"]}))
    assert card.checkpoint == "task"
    with pytest.raises(ValueError, match=r"holds a run with stages=\['distillation', 'task'\]"):
        adapt(parse_config(given))


NYSTROM = {"mechanism": "nystrom", "num_landmarks": 4, "window_size": 4, "num_sinks": 1}


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (NYSTROM, {"anneal": {"alpha": 1.0}}, "no converted head has α"),
        (NYSTROM, {"anneal": {"num_landmarks": 9}}, "anneal.num_landmarks must be at most the model's own 4, got 9"),
        (NYSTROM, {"anneal": {"num_landmarks": 3}}, "anneal.num_landmarks must be at most the model's own 2, got 3"),
        ({"metric": "l2"}, {"train": "lora", "lora_targets": ["nope"]}, "nope"),
    ],
)
def test_what_a_later_stage_refuses_is_said_before_the_first_one(tmp_path, spec, options, said):
    stage_options = {"distillation": options}
    if options.get("anneal", {}).get("num_landmarks") == 3:
        stage_options["transfer"] = {"anneal": {"num_landmarks": 2}}
    given = values(tmp_path, gpt2(), spec=spec, max_length=32, max_steps=1, stage_options=stage_options)
    with pytest.raises(ValueError, match=said):
        adapt(parse_config(given))
    assert (tmp_path / "run" / "calibrated").exists()
    assert not (tmp_path / "run" / "transfer").exists()
    assert not (tmp_path / "run" / "distattn_scorecard.json").exists()
    # With other options it goes on from the conversion, which is not to blame.
    card = adapt(parse_config({**given, "stage_options": {}}))
    assert card.checkpoint == "distillation"


def test_a_t5_window_is_refused_before_anything_trains(tmp_path):
    model = t5(relative_attention_max_distance=6, relative_attention_num_buckets=8)
    given = values(
        tmp_path, model, source_column="text", target_column="title", text_column=None, max_steps=1,
        spec={**NYSTROM, "window_size": 8}, stage_options={"distillation": {"anneal": {"window_size": 2}}},
    )  # fmt: skip
    with pytest.raises(ValueError, match="anneal.window_size=2: .*relative position bias"):
        adapt(parse_config(given))
    assert not (tmp_path / "run" / "transfer").exists()


def test_rows_too_short_for_the_landmarks_of_a_given_student(tmp_path):
    """The rows are cut where the model ends, at 128 tokens."""
    text = {"input_ids": torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(0))}
    student = convert(gpt2(), AttentionSpec(**NYSTROM, exact_below=128), calibration=text)
    given = values(tmp_path, gpt2(), max_length=256, max_steps=1, eval_data=None)
    given |= {"spec": None, "student": str(checkpoint(tmp_path / "student", student)), "eval_data": given["train_data"]}
    with pytest.raises(ValueError, match="stage 'distillation' would train no landmark: .*max_length=128"):
        adapt(parse_config(given))
    assert not (tmp_path / "run" / "transfer").exists()


def test_annealing_is_not_for_the_fine_tuned_teacher(tmp_path):
    given = values(
        tmp_path, gpt2(), stages=["transfer"], teacher_finetuned=True, max_steps=1, anneal={"alpha": 0.9},
    )  # fmt: skip
    assert adapt(parse_config(given)).row("teacher_finetuned") is not None


def test_perplexity_is_that_of_all_labels(tmp_path):
    given = values(tmp_path, gpt2())
    config = parse_config(given)
    model = gpt2()
    tokenizer = AutoTokenizer.from_pretrained(given["teacher"])
    data = build_data(config.data, "causal-lm", tokenizer, model.config)
    found = score_model(model, "causal-lm", data, tokenizer, batch_size=3, progress=False)
    total, right, count = 0.0, 0, 0
    for row in data.evaluation:
        ids = torch.as_tensor(row["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[1:]).sum())
        count += len(ids) - 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["accuracy"] == right / count


def test_an_encoder(tmp_path):
    given = values(
        tmp_path, bert(BertModel), stages=["transfer", "distillation"], pair_columns=["title", "text"], max_steps=2,
        calibration_data=str(text_file(tmp_path / "calibration.jsonl", 8, seed=3)),
    )  # fmt: skip
    card = adapt(parse_config(given))
    assert card.metric == "mrr"
    assert card.greater_is_better
    assert card.row("transfer").metrics.keys() == {"retrieval_at_1", "mrr"}
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "student")).__name__ == "DistAttnBertModel"


def test_a_classifier_and_a_sequence_to_sequence_model(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    given = values(tmp_path / "a", bert(CLASSIFIER, num_labels=2), max_steps=2)
    card = adapt(parse_config(given))
    assert card.task == "sequence-classification"
    assert 0 <= card.row("distillation").score <= 1
    given = values(tmp_path / "b", t5(), max_steps=2, source_column="text", target_column="title", text_column=None)
    card = adapt(parse_config(given))
    assert card.task == "seq2seq"
    assert card.row("distillation").score > 1


def test_nystrom_with_its_controls_and_annealing(tmp_path):
    given = values(
        tmp_path, gpt2(), stages=["transfer"], max_length=32, max_steps=4,
        spec={"mechanism": "nystrom", "num_landmarks": 6, "window_size": 8, "num_sinks": 1},
        anneal={"num_landmarks": 3, "window_size": 4, "hold": 0.25}, controls=["window_only", "no_attention"],
    )  # fmt: skip
    card = adapt(parse_config(given))
    assert {row.name for row in card.rows} == {"teacher", "calibrated", "window_only", "no_attention", "transfer"}
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    spec = student.config.attention_specs[0]
    assert (spec.num_landmarks, spec.window_size) == (3, 4)
    assert {g.num_heads for s in student.attention_states.values() for g in s.groups} == {4}
    assert all(tuple(g.landmarks.shape) == (4, 3, 8) for s in student.attention_states.values() for g in s.groups)


def test_a_hidden_number_is_asked_for_in_every_row(tmp_path):
    """In ten texts made of the evaluation data; the scores are those of the first student, loaded again."""
    given = values(
        tmp_path, gpt2(), teacher=str(GPT2_ENGLISH), eval_data=str(GPT2_ENGLISH / "heldout.txt"), stages=["transfer"],
        max_steps=1, passkey_length=120, max_eval_samples=40, max_length=64, init="plain",
        calibration_steps=None,
    )  # fmt: skip
    config = parse_config(given)
    card = adapt(config)
    student, tokenizer = load_checkpoint(str(tmp_path / "run" / "calibrated"))
    asked = passkey_questions(student, tokenizer, build_data(config.data, "causal-lm", tokenizer, student.config), 120)
    assert {question.ids.shape for question in asked} == {(1, 120)}
    assert len({(question.place, question.ids[0, -1].item()) for question in asked}) > 5
    # A verse of the evaluation data.
    running = tokenizer.decode(asked[-1].ids[0, 10:20])
    assert running in "".join(read_texts(given["eval_data"]))
    assert [row.name for row in card.rows] == ["teacher", "calibrated", "transfer"]
    expected = score_questions(student, asked, "passkey")
    row = card.row("calibrated")
    assert (row.metrics["passkey"], row.metrics["passkey_loss"]) == (
        expected["exact"], pytest.approx(expected["log_loss"], rel=1e-4)
    )  # fmt: skip
    assert card.row("teacher").metrics["passkey_loss"] != row.metrics["passkey_loss"]
    assert card.data["passkey_length"] == 120
    assert "passkey, 120" in card.table()
    assert Scorecard.load(tmp_path / "run" / "student").to_dict() == card.to_dict()


def test_a_hidden_number_that_cannot_be_asked_for_is_refused(tmp_path):
    given = values(tmp_path, gpt2(), teacher=str(GPT2_ENGLISH), passkey_length=257)
    with pytest.raises(ValueError, match="passkey_length=257: lengths must be at most 256, the positions of 'teacher'"):
        adapt(parse_config(given))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="passkey_length must be None or an integer >= 2, got 0"):
        parse_config({**given, "passkey_length": 0})
    with pytest.raises(ValueError, match="passkey_length=120: task 'passkey' needs a causal language model"):
        passkey_questions(bert(), None, None, 120)


def test_a_given_student_is_checked_against_the_teacher(tmp_path):
    given = values(tmp_path, gpt2(), stages=["transfer"], max_steps=1)
    student = convert(gpt2(), AttentionSpec("l2", transform="scalar"), init="plain")
    given |= {"spec": None, "student": str(checkpoint(tmp_path / "student", student))}
    card = adapt(parse_config(given))
    assert card.row("transfer") is not None
    other = convert(llama(), AttentionSpec("l2", transform="scalar"), init="plain")
    given |= {"student": str(checkpoint(tmp_path / "other", other)), "output_dir": str(tmp_path / "run2")}
    with pytest.raises(ValueError, match="teacher and student are of different families"):
        adapt(parse_config(given))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.add_tokens(["more"])
    student.save_pretrained(tmp_path / "renamed")
    tokenizer.save_pretrained(tmp_path / "renamed")
    given |= {"student": str(tmp_path / "renamed"), "output_dir": str(tmp_path / "run3")}
    with pytest.raises(ValueError, match="tokenizer has 65 tokens but DistAttnGPT2LMHeadModel embeds 64"):
        adapt(parse_config(given))


def test_bad_input_is_found_before_anything_is_written(tmp_path):
    given = values(tmp_path, gpt2())
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    for changes, said in (
        ({"train_data": str(tmp_path / "empty.jsonl")}, "train_data"),
        ({"eval_data": None}, "eval_data must be given"),
        ({"task": "masked-lm"}, "task 'masked-lm' needs another head than GPT2LMHeadModel"),
        ({"text_column": "body"}, "body"),
    ):
        with pytest.raises(ValueError, match=said):
            adapt(parse_config({**given, **changes}))
    assert not (tmp_path / "run").exists()


def test_the_far_field_and_attention_can_be_taken_away(tmp_path):
    text = {"input_ids": torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(0))}
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1)
    student = convert(gpt2(), spec, calibration=text)
    alone = without_far_field(student)
    ids = text["input_ids"][:2]
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 7) % 61 + 3
    # Two layers of 4 keys and a sink: what stands 10 tokens back cannot be seen.
    assert torch.allclose(alone(ids).logits[:, 20:], alone(changed).logits[:, 20:], atol=1e-5)
    assert not torch.allclose(student(ids).logits[:, 20:], student(changed).logits[:, 20:], atol=1e-5)
    # Queries that `exact_below` lets see everything would make it the teacher.
    spec = replace(spec, exact_below=48)
    exact = convert(gpt2(), spec, calibration=text)
    assert torch.allclose(without_far_field(exact)(ids).logits, alone(ids).logits, atol=1e-5)
    with no_attention(student):
        assert torch.allclose(student(ids).logits[:, 11:], student(changed).logits[:, 11:], atol=1e-6)
    assert not torch.allclose(student(ids).logits[:, 11:], student(changed).logits[:, 11:], atol=1e-6)
    with pytest.raises(ValueError, match="'window_only'. needs a model with mechanism='nystrom'"):
        without_far_field(convert(gpt2(), AttentionSpec("l2"), init="plain"))


def test_retrieval_heads_lose_what_lies_beyond_their_window():
    ids = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 7) % 61 + 3
    spec = AttentionSpec(mechanism="retrieval", window_size=4, num_sinks=1, block_size=4, num_blocks=4)
    student = convert(gpt2(), spec)
    alone = without_far_field(student)
    with torch.no_grad():
        # Windows are read in whole blocks: two layers reach back 2 * (4 + 4 - 1) at most.
        assert torch.allclose(alone(ids).logits[:, 26:], alone(changed).logits[:, 26:], atol=1e-5)
        assert not torch.allclose(student(ids).logits[:, 26:], student(changed).logits[:, 26:], atol=1e-5)
    assert all(group.spec == spec for state in student.attention_states.values() for group in state.groups)


def test_cross_attention_without_its_far_field_is_nothing():
    """It has neither window nor sinks: what is left is the same as no attention at all."""
    teacher = t5()
    batch = {"input_ids": torch.randint(3, 64, (2, 20)), "decoder_input_ids": torch.randint(3, 64, (2, 10))}
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, attention="cross")
    student = convert(teacher, spec, calibration=batch, options=CalibrationOptions(steps=1, progress=False))
    with torch.no_grad(), no_attention(student):
        nothing = student(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(without_far_field(student)(**batch).logits, nothing)


def test_the_card_itself(tmp_path):
    card = Scorecard.for_task("sequence-classification", {"train": "a", "eval": "b"}, "someone/model")
    card.put("transfer", {"accuracy": 0.6}, trained_parameters=10, tokens=1000, seconds=2.5)
    assert card.row("transfer").ratio is None
    card.put("teacher", {"accuracy": 0.8})
    assert card.row("transfer").ratio == pytest.approx(0.75)
    card.put("teacher", {"accuracy": 0.5})
    assert [row.name for row in card.rows] == ["teacher", "transfer"]
    assert card.row("transfer").ratio == pytest.approx(1.2)
    card.save(tmp_path)
    assert Scorecard.load(tmp_path) == card
    assert Scorecard.load(tmp_path / "none") is None
    with pytest.raises(ValueError, match="a scorecard row must be one of teacher"):
        card.put("best", {"accuracy": 1.0})
    with pytest.raises(ValueError, match="version must be 1, got 2"):
        Scorecard.from_dict({**card.to_dict(), "version": 2})


def test_tasks_have_a_metric():
    assert [task_of(m) for m in (gpt2(), bert(), t5(), bert(CLASSIFIER), bert(BertModel))] == [
        "causal-lm", "masked-lm", "seq2seq", "sequence-classification", "embedding",
    ]  # fmt: skip
    assert {task.metric for task in TASKS.values()} == {"perplexity", "accuracy", "mrr"}


def test_the_command_line(tmp_path, capsys, monkeypatch):
    from distattn_hf import cli

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values(tmp_path, gpt2(), stages=["transfer"], max_steps=5)))
    monkeypatch.setattr("sys.argv", ["distattn", "adapt", str(tmp_path / "c.yaml"), "max_steps=1", "spec.metric=l1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "to teacher" in said
    assert f"saved to {tmp_path / 'run' / 'student'}" in said
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.config.attention_specs[0].metric == "l1"
    monkeypatch.setattr("sys.argv", ["distattn", "adapt", str(tmp_path / "c.yaml"), "max_stps=1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "error: unknown key 'max_stps'; did you mean max_steps" in capsys.readouterr().err


def test_a_softened_student_trains_its_epsilon_beside_the_plain_swap(tmp_path):
    """The control "plain" is the plain distance: without a fit there is no ε."""
    spec = {"metric": "l1", "transform": "scalar", "softening": "fit"}
    given = values(tmp_path, gpt2(), spec=spec, stages=["transfer"], controls=["plain"], max_steps=3)
    card = adapt(parse_config(given))
    assert [row.name for row in card.rows] == ["teacher", "plain", "calibrated", "transfer"]
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).attention_states["h.0.attn"].groups[0]
        for name in ("calibrated", "transfer/final")
    )
    assert bool((before.log_softening != after.log_softening).all())
