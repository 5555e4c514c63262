"""One YAML for everything: what it means, what the command line changes, and what is refused before anything starts."""

import pytest
import yaml

from distattn_hf import AttentionSpec
from distattn_hf.training.arguments import parse_config, read_config
from distattn_hf.training.arguments_scratch import read_scratch_config
from distattn_hf.training.stages import StageOptions

LEAST = {"teacher": "minilm", "spec": {"metric": "l1"}, "train_data": "news", "output_dir": "out/x", "use_cpu": True}


def config(tmp_path, overrides=(), **values):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **values}))
    return read_config(path, overrides)


def test_every_part_gets_its_arguments(tmp_path):
    found = config(
        tmp_path, max_length=64, learning_rate=3e-4, stages=["transfer", "task"], calibration_steps=7, seed=5,
        learning_rates={"attention": 0.01}, lr_scheduler_kwargs={"num_cycles": 2},
    )  # fmt: skip
    assert found.model.specs == [AttentionSpec("l1")]
    assert found.model.calibration_steps == 7
    assert found.data.max_length == 64
    assert found.data.seed == found.training.seed == 5
    assert found.training.learning_rate == 3e-4
    assert found.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.adaptation.stages == ["transfer", "task"]


def test_a_stage_has_what_is_shared_and_its_own(tmp_path):
    found = config(
        tmp_path,
        stages=["transfer", "distillation"],
        max_steps=10,
        temperature=2.0,
        learning_rates={"attention": 0.01, "qk": 0.001},
        stage_options={
            "transfer": {"max_steps": 3, "anneal": {"alpha": 1.0}},
            "distillation": {"learning_rates": {"attention": 0.002}, "hidden_weight": 0.5, "train": "attention+qk"},
        },
    )
    first, second = (found.adaptation.options_for(stage) for stage in ("transfer", "distillation"))
    assert (first.trains("transfer"), second.trains("distillation")) == ("attention", "attention+qk")
    assert (first.annealing.alpha, second.annealing.alpha) == (1.0, None)
    assert second.learning_rates == {"attention": 0.002, "qk": 0.001}
    assert first.temperature == second.temperature == 2.0
    assert (first.hidden_weight, second.hidden_weight) == (0.0, 0.5)
    training = found.training_for("transfer")
    assert (training.max_steps, found.training_for("distillation").max_steps) == (3, 10)
    assert training.output_dir == "out/x/transfer"


def test_overrides_reach_nested_keys_and_mean_numbers(tmp_path):
    overrides = [
        "spec.metric=l2", "learning_rate=1e-3", "learning_rates.attention=5e-2", "stages=[distillation]",
        "stage_options.distillation.max_steps=4", "calibration_data=null",
    ]  # fmt: skip
    found = config(tmp_path, overrides)
    assert found.model.specs[0].metric == "l2"
    assert found.training.learning_rate == 1e-3
    assert found.adaptation.learning_rates == {"attention": 0.05}
    assert found.training_for("distillation").max_steps == 4
    mixed = config(tmp_path, ["spec.1.metric=cosine"], spec=[{"layers": "0-2"}, {"layers": "3-5"}])
    assert [spec.metric for spec in mixed.model.specs] == ["sqeuclidean", "cosine"]


def test_a_config_of_the_other_command_is_told_so():
    with pytest.raises(ValueError, match="a model and no teacher: it is for `distattn train`"):
        read_config("configs/training/native_causal_lm.yaml")
    with pytest.raises(ValueError, match="a teacher and no model: it is for `distattn adapt`"):
        read_scratch_config("configs/training/gpt2_english.yaml")


def test_no_as_a_strategy_is_no_false(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "save_strategy: no\nstage_options: {transfer: {eval_strategy: no}}\n")
    found = read_config(path, ["logging_strategy=no"])
    assert (found.training.save_strategy, found.training.logging_strategy) == ("no", "no")
    assert found.training_for("transfer").eval_strategy == "no"


def test_spec_from_a_file(tmp_path):
    found = config(tmp_path, spec="configs/attention/l2.yaml")
    assert found.model.specs[0].metric == "l2"


def test_spec_by_name(tmp_path):
    assert config(tmp_path, spec="l2").model.specs == [AttentionSpec("l2")]
    found = config(tmp_path, spec=["l1", {"metric": "cosine", "layers": "0-2"}])
    assert found.model.specs == [AttentionSpec("l1"), AttentionSpec("cosine", layers="0-2")]


def test_yaml_numbers_with_an_exponent_and_no_point(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "learning_rate: 1e-3\nlearning_rates: {attention: 2e-2}\n")
    found = read_config(path)
    assert found.training.learning_rate == 1e-3
    assert found.adaptation.learning_rates["attention"] == 0.02


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": "abc"}, "learning_rate must be a number, got 'abc'"),
        ({"max_steps": 2.5}, "max_steps must be an integer, got 2.5"),
        ({"stage_options": {"transfer": {"seed": "one"}}}, "stage_options.transfer.seed must be an integer, got 'one'"),
        ({"learning_rat": 1.0}, "unknown key 'learning_rat'; did you mean learning_rate"),
        ({"spec": {"metrik": "l1"}}, "AttentionSpec has no field 'metrik'"),
        ({"stage_options": {"transfr": {}}}, "unknown key 'transfr' in stage_options; did you mean transfer"),
        ({"stage_options": {"transfer": {"max_step": 1}}}, "unknown key 'max_step' in stage_options.transfer; did you"),
        ({"stage_options": {"transfer": {"output_dir": "x"}}}, "unknown key 'output_dir' in stage_options.transfer"),
        ({"learning_rates": {"atention": 1.0}}, "unknown key 'atention' in learning_rates; did you mean attention"),
        ({"learning_rates": {"attention": "fast"}}, "learning_rates.attention must be a number"),
        ({"anneal": {"alfa": 1.0}}, "unknown key 'alfa' in anneal; did you mean alpha"),
        ({"stages": []}, "stages must name at least one"),
        ({"stages": ["warmup"]}, "stages must be some of transfer, distillation, task, got 'warmup'"),
        ({"stages": ["transfer", "transfer"]}, "stages must be a list without repetition"),
        ({"train": "everything"}, "train must be one of attention, attention.qk, all, lora or None, got 'everything'"),
        ({"train": "all"}, "train='all' does not go with stage 'transfer'"),
        ({"controls": ["chance"]}, "controls must be some of plain, window_only, no_attention, got 'chance'"),
        ({"controls": ["window_only"]}, "'window_only' needs a spec with mechanism='nystrom' or 'retrieval'"),
        ({"controls": ["plain"], "spec": {"mechanism": "nystrom"}}, "'plain' needs a spec with mechanism='distance'"),
        ({"anneal": {"window_size": 4}}, "anneal.window_size needs a spec with mechanism='nystrom'"),
        ({"spec": None}, "give either spec"),
        ({"student": "out/s"}, "give either spec"),
        ({"spec": 3}, "spec must be an AttentionSpec, the name of a metric or mech"),
        (
            {"init": "plain", "calibration_data": "t.txt"},
            "calibration_data='t.txt' is for init='calibrated'; init='plain' fits nothing",
        ),
        (
            {"init": "exact", "calibration_tokens": 9},
            "calibration_tokens=9 is for init='calibrated'; init='exact' fits nothing",
        ),
        ({"init": "random"}, "init must be one of exact, calibrated, plain, got 'random'"),
        ({"task": "chess"}, "task must be one of causal-lm"),
        ({"task": "embedding", "teacher_finetuned": True}, "task 'embedding' has no loss of its own"),
        ({"teacher": None}, "teacher must be given, got None"),
        ({"train_data": None}, "train_data must be given, got None"),
        ({"output_dir": None}, "output_dir must be given, got None"),
        ({"max_length": 1}, "max_length must be an integer >= 2"),
        ({"pair_columns": ["title"]}, r"pair_columns must be \[query column, passage column\]"),
        ({"lora_r": 0}, "lora_r must be an integer >= 1"),
        ({"lora_alpha": True}, "lora_alpha must be an integer >= 1, got True"),
        ({"lora_targets": []}, r"lora_targets must be a list of module names, a pattern or None, got \[\]"),
        ({"lora_targets": [3]}, "lora_targets must be a list of module names"),
        ({"temperature": -1}, "temperature must be a finite number > 0, got -1"),
        ({"temperature": "x"}, "temperature must be a finite number > 0, got 'x'"),
        ({"temperature": float("nan")}, "temperature must be a finite number > 0, got nan"),
        ({"hidden_weight": -1}, "hidden_weight must be a finite number >= 0, got -1"),
        ({"dropout": "no"}, "dropout must be True or False, got 'no'"),
        (
            {"stages": ["transfer", "distillation"], "stage_options": {"distillation": {"task_weight": 2}}},
            r"task_weight must be a number in \[0, 1\], got 2",
        ),
        (
            {"teacher_finetuned": True, "stage_options": {"teacher_finetuned": {"dropout": 1}}},
            "dropout must be True or False, got 1",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is for stage 'task', not 'transfer'"),
        ({"streaming": True}, "stage 'transfer': max_steps must be > 0 with streaming=True"),
        (
            {"stages": ["distillation"], "max_length": 64, "spec": {"mechanism": "nystrom", "exact_below": 64}},
            "train no landmark: .* max_length=64 tokens, .* exact_below=64",
        ),
    ],
)
def test_refused_up_front(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps", "override must be key=value, got 'max_steps'"),
        ("spec.metric.name=x", "'spec.metric' is 'l1', which has no fields"),
        ("spec=[", "is not YAML"),
        ("max_stepz=3", "unknown key 'max_stepz'; did you mean max_steps"),
    ],
)
def test_bad_overrides(tmp_path, override, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, [override])


def test_files_that_hold_something_else(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_config(tmp_path / "list.yaml")


def test_exact_below_is_fine_in_transfer_and_for_longer_rows(tmp_path):
    spec = {"mechanism": "nystrom", "exact_below": 64}
    config(tmp_path, spec=spec, max_length=64)
    config(tmp_path, spec=spec, max_length=65, stages=["distillation"])


def test_a_given_mapping_is_not_changed():
    values = {**LEAST, "learning_rates": {"attention": 0.01}}
    parse_config(values)
    assert values == {**LEAST, "learning_rates": {"attention": 0.01}}


def test_train_is_by_stage_where_nothing_is_said():
    assert StageOptions().trains("transfer") == "attention"
    assert StageOptions().trains("task") == "all"
