"""Every conversion says what is known of its loss: none by construction, measured, or not measured and how to."""

import pytest

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.report import ConversionReport
from distattn_hf.hub import build_card
from tests.conversion.models import gpt2, token_batch
from tests.conversion.nystrom_cases import build

QUICK = CalibrationOptions(steps=2, progress=False)
NONE = "none by construction in {} heads, which equal the teacher's up to rounding"
RETRIEVAL = "not measured without text in {} heads that retrieve; give calibration"
OTHER = "not measured in {} heads, to which nothing was fitted"
COSTS = "what it costs: distattn evaluate"


def texts(teacher) -> dict:
    return {"calibration": [token_batch(teacher, length=40)], "options": QUICK}


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (AttentionSpec(), lambda teacher: {"init": "exact"}, [NONE.format(8)]),
        ("l2", lambda teacher: {"init": "plain"}, [OTHER.format(8), COSTS]),
        ("l2", texts, []),
        ("retrieval", lambda teacher: {}, [RETRIEVAL.format(8), COSTS]),
        ("retrieval", texts, []),
        (AttentionSpec("l2", mechanism="retrieval"), lambda teacher: {"init": "plain"}, [RETRIEVAL.format(8), COSTS]),
        (AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=8, exact_below=0), texts, []),
        (
            [AttentionSpec(layers=[0]), AttentionSpec(mechanism="retrieval", layers=[1])],
            lambda teacher: {"init": "exact"},
            [NONE.format(4), RETRIEVAL.format(4), COSTS],
        ),
    ],
    ids=["exact", "plain", "fitted", "retrieval", "caught", "retrieval l2", "nystrom", "mixed"],
)
def test_what_is_known_is_said(spec, options, said):
    teacher = build("gpt2")
    report = convert(teacher, spec, **options(teacher)).conversion_report
    assert len(report.loss) == len(said)
    for line, expected in zip(report.loss, said):
        assert line.startswith(expected)
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
