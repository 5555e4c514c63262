"""What `adapt` asks of the conversion, how many steps it counts, and which pairs it refuses: without any training."""

from types import SimpleNamespace

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from distattn_hf.training import first_student
from distattn_hf.training.arguments import parse_config
from distattn_hf.training.first_student import converted
from distattn_hf.training.stages import check_pair
from distattn_hf.training.trainer import num_steps
from tests.conversion.models import gpt2
from tests.training.rows import values


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(first_student, "convert", lambda *given, **options: calls.append((*given, options)))
    return calls


def test_the_fit_is_the_one_the_config_asks_for(tmp_path, asked):
    fit = {"calibration_steps": 7, "calibration_tokens": 90, "calibration_length": 30, "seed": 11}
    config, teacher = parse_config({**values(tmp_path, gpt2()), **fit, "disable_tqdm": True}), gpt2()
    converted(config, teacher, "a tokenizer", None)
    ((model, specs, options),) = asked
    assert (model, specs, options["init"]) == (teacher, config.model.specs, "calibrated")
    assert options["tokenizer"] == "a tokenizer"
    assert options["calibration"]
    chosen = options["options"]
    assert (chosen.steps, chosen.max_tokens, chosen.max_length, chosen.seed) == (7, 90, 30, 11)
    assert not chosen.progress


def test_the_control_of_a_plain_swap_has_nothing_that_is_fitted(tmp_path, asked):
    spec = {"metric": "l2", "transform": "scalar", "softening": 2.0, "layers": [1]}
    config = parse_config({**values(tmp_path, gpt2()), "spec": spec})
    converted(config, gpt2(), None, None, init="plain")
    ((_, specs, options),) = asked
    assert specs == [AttentionSpec("l2", layers=(1,))]
    assert options == {"init": "plain"}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({}, 10),
        ({"gradient_accumulation_steps": 4}, 2),
        ({"world_size": 2}, 5),
        ({"rows": 1}, 1),
    ],
)
def test_steps_are_counted_as_the_trainer_takes_them(given, steps):
    """Three epochs of 14 rows by 4."""
    arguments = {
        "max_steps": -1, "num_train_epochs": 3.0, "per_device_train_batch_size": 4, "world_size": 1,
        "gradient_accumulation_steps": 1, **given,
    }  # fmt: skip
    assert num_steps(SimpleNamespace(**arguments), range(given.get("rows", 14))) == steps


def test_a_student_with_a_layer_or_a_size_of_its_own_is_no_student_of_this_teacher():
    teacher = gpt2()
    check_pair(teacher, convert(teacher, AttentionSpec("l2"), init="plain"))
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    student.transformer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the teacher has no 'transformer.extra.weight'"):
        check_pair(teacher, student)
    student = convert(teacher, AttentionSpec("l2"), init="plain")
    student.transformer.ln_f.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=r"'transformer.ln_f.weight' is \(32,\) in the teacher and \(5,\)"):
        check_pair(teacher, student)
