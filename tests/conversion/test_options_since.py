"""What was measured with other options than those that are set now is not told as if it were of now."""

import pytest

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.convert import current_report
from distattn_hf.hub import build_card
from distattn_hf.storage.folders import change_options
from tests.conversion.models import gpt2, token_batch

QUICK = CalibrationOptions(steps=2, progress=False)


def students() -> dict:
    texts = {"calibration": [token_batch(gpt2(), length=40)], "options": QUICK}
    nystrom = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=8, exact_below=0, beyond="retrieval")
    share = {**texts, "options": CalibrationOptions(steps=2, progress=False, beyond_share=0.5)}
    return {
        "retrieval": convert(gpt2(), "retrieval", num_blocks=30, min_weight=0, **texts),
        "retrieval l2": convert(gpt2(), AttentionSpec("l2", mechanism="retrieval"), **texts),
        "nystrom": convert(gpt2(), nystrom, **share),
    }


CHANGES = [
    ("retrieval", {"num_blocks": 0}),
    ("retrieval", {"min_weight": 0.5}),
    ("retrieval", {"window_size": 1}),
    ("retrieval", {"num_sinks": 0}),
    ("retrieval", {"block_size": 8}),
    ("retrieval l2", {"num_blocks": 1}),
    ("nystrom", {"num_blocks": 1}),
    ("nystrom", {"window_size": 16}),
]


@pytest.fixture(scope="module")
def made():
    return students()


@pytest.mark.parametrize(("name", "options"), CHANGES)
def test_shares_of_other_options_are_not_told_as_of_now(made, tmp_path, name, options):
    made[name].save_pretrained(tmp_path)
    student = type(made[name]).from_pretrained(tmp_path)
    told = "with other options than those set now"

    def card() -> str:
        return build_card(tmp_path, "user/x", license="mit").text

    share = f"these held {100 * student.conversion_report.mean_caught:.2f}% of the attention's weight"
    assert (share in card()) == (name != "nystrom")
    assert "was set otherwise" not in card()
    assert "other keys were read" not in card()
    assert not any(told in report.summary() for report in (student.conversion_report, current_report(student)))

    def check(student):
        assert all(told in report.summary() for report in (student.conversion_report, current_report(student)))
        assert share not in card()
        assert "was set otherwise when this was measured" in card()
        assert ("other keys were read" in card()) == (name != "nystrom")

    change_options(tmp_path, **options)
    check(type(student).from_pretrained(tmp_path))
    student.set_attention_options(**options)
    student.save_pretrained(tmp_path)
    # Reports that were saved with it, and read again.
    again = type(student).from_pretrained(tmp_path)
    check(again)
    if "window_size" in options and name == "nystrom":
        return  # it can only grow
    again.conversion_report = current_report(again)
    again.set_attention_options(**{n: getattr(made[name].config.attention_specs[0], n) for n in options})
    again.save_pretrained(tmp_path)
    assert "was set otherwise" not in card()


def test_a_backend_changes_nothing_that_was_measured():
    student = convert(gpt2(), "l2", calibration=[token_batch(gpt2())], options=QUICK)
    student.set_attention_options(backend="reference")
    assert not current_report(student).options_changed


def test_set_reaches_what_heads_beyond_nystrom_read(made, tmp_path):
    made["nystrom"].save_pretrained(tmp_path)
    (spec,) = change_options(tmp_path, num_blocks=1)
    again = type(made["nystrom"]).from_pretrained(tmp_path)
    assert [s.num_blocks for s in again.config.attention_specs] == [spec.num_blocks] == [1]
