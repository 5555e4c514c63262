"""Every conversion says what is known of its loss: none by construction, measured, or not measured and how to."""

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.convert import current_report
from distattn_hf.conversion.report import ConversionReport
from distattn_hf.hub import build_card
from tests.conversion.models import gpt2, token_batch
from tests.conversion.nystrom_cases import build

QUICK = CalibrationOptions(steps=2, progress=False)
NONE = "none by construction in {} heads as they were converted, equal to the teacher's"
RETRIEVAL = "not measured without text in {} heads that retrieve; give calibration"
OTHER = "not measured in {} heads, to which nothing was fitted"
COSTS = "; what it costs is measured by distattn evaluate"


def texts(teacher) -> dict:
    return {"calibration": [token_batch(teacher, length=40)], "options": QUICK}


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (AttentionSpec(), lambda teacher: {"init": "exact"}, [NONE.format(8)]),
        ("l2", lambda teacher: {"init": "plain"}, [OTHER.format(8)]),
        ("l2", texts, []),
        ("retrieval", lambda teacher: {}, [RETRIEVAL.format(8)]),
        ("retrieval", texts, []),
        (
            AttentionSpec("l2", mechanism="retrieval"),
            lambda teacher: {"init": "plain"},
            [RETRIEVAL.format(8), OTHER.format(8)],
        ),
        (AttentionSpec("l2", mechanism="retrieval"), lambda t: {"init": "plain", **texts(t)}, [OTHER.format(8)]),
        ("dot", lambda teacher: {"init": "plain"}, [NONE.format(8)]),
        (AttentionSpec("dot", lam=2.0), lambda teacher: {"init": "plain"}, [OTHER.format(8)]),
        ("dot", texts, []),
        (AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=8, exact_below=0), texts, []),
        (
            [AttentionSpec(layers=[0]), AttentionSpec(mechanism="retrieval", layers=[1])],
            lambda teacher: {"init": "exact"},
            [NONE.format(4), RETRIEVAL.format(4)],
        ),
    ],
    ids=[
        "exact",
        "plain",
        "fitted",
        "retrieval",
        "caught",
        "retrieval l2",
        "caught l2",
        "dot",
        "other scale",
        "dot fitted",
        "nystrom",
        "mixed",
    ],
)
def test_what_is_known_is_said(spec, options, said):
    teacher = build("gpt2")
    report = convert(teacher, spec, **options(teacher)).conversion_report
    assert len(report.loss) == len(said)
    for line, expected in zip(report.loss, said):
        assert line.startswith(expected)
    # How to measure is said once, where something was not.
    assert [COSTS in line for line in report.loss] == [
        "not measured" in line and line == report.loss[-1] for line in report.loss
    ]
    assert [line for line in report.table().splitlines() if line.startswith("loss: ")] == [
        f"loss: {line}" for line in report.loss
    ]
    assert report.to_dict()["loss"] == report.loss == ConversionReport.from_dict(report.to_dict()).loss


def test_the_card_claims_no_exactness_of_retrieval(tmp_path):
    teacher = gpt2()
    convert(teacher, "retrieval").save_pretrained(tmp_path / "none")
    caught = convert(teacher, "retrieval", **texts(teacher))
    caught.save_pretrained(tmp_path / "caught")
    cards = [build_card(tmp_path / name, "user/x", license="mit").text for name in ("none", "caught")]
    for text in cards:
        assert "nothing, by construction" not in text
        assert "the same function" not in text
        assert "The quality of this checkpoint was not measured" in text
    assert "How much of the attention's weight these hold was not measured." in cards[0]
    share = caught.conversion_report.mean_caught
    assert f"these held {100 * share:.2f}% of the attention's weight" in cards[1]


def card_of(student, folder) -> str:
    student.save_pretrained(folder)
    return build_card(folder, "user/x", license="mit").text


def test_the_card_says_what_was_not_fitted(tmp_path):
    spec = AttentionSpec("l2", mechanism="retrieval")
    student = convert(gpt2(), spec, init="plain")
    told = "Nothing was fitted to the distances: this is a control. Expect a large loss."
    for name, given in (("none", {}), ("caught", texts(gpt2()))):
        text = card_of(convert(gpt2(), spec, init="plain", **given), tmp_path / name)
        assert told in text
        assert "The conversion itself fitted nothing." in text
        assert "The fit used" not in text
        assert ("It measured on 80 tokens." in text) == bool(given)
    assert student.conversion_report.heads_by_loss == {"exact": 0, "unread": 8, "unfitted": 8}
    # Nothing to fit in heads that have the teacher's own logits, whatever init says.
    lifted = convert(gpt2(), "retrieval", init="plain")
    assert lifted.conversion_report.heads_by_loss == {"exact": 0, "unread": 8, "unfitted": 0}
    assert "Expect a large loss" not in card_of(lifted, tmp_path / "lifted")


def test_the_teachers_own_dot_product_is_exact(tmp_path):
    teacher = gpt2()
    student = convert(teacher, "dot", init="plain")
    batch = token_batch(teacher)
    assert (student(**batch).logits == teacher(**batch).logits).all()
    text = card_of(student, tmp_path / "own")
    assert "nothing, by construction: it is a dot product still" in text
    assert "lifted" not in text
    assert "Expect a large loss" not in text
    text = card_of(convert(teacher, AttentionSpec("dot", lam=2.0), init="plain"), tmp_path / "other")
    assert "nothing, by construction" not in text
    assert "Nothing was fitted: this is a control. Expect a large loss." in text


@pytest.mark.parametrize("spec", [AttentionSpec(), "dot"], ids=["lifted", "dot"])
def test_training_afterwards_is_not_denied(tmp_path, spec):
    student = convert(gpt2(), spec, init="plain" if spec == "dot" else "exact").train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    batch = token_batch(student)
    for _ in range(3):
        student(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    text = card_of(student, tmp_path)
    report = type(student).from_pretrained(tmp_path).conversion_report
    for found in (report, current_report(student)):
        assert found.heads_by_loss == {"exact": 8, "unread": 0, "unfitted": 0}
        assert "as they were converted" in found.loss[0]
        assert found.loss[0].endswith("(training since then is not recorded here)")
    assert "What was done to the weights after the conversion is not recorded here." in text
