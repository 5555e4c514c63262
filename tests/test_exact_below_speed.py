"""The measurement of what `exact_below` costs: checked before it is timed, paired, as JSON with its provenance."""

import json

import pytest

from distattn_hf.experiments.exact_below_speed import RESULTS, check, main, make_pair
from tests.conversion.models import bert, llama
from tests.conversion.nystrom_cases import converted, nystrom


@pytest.mark.parametrize("is_converted", [True, False])
def test_it_checks_and_measures(tmp_path, capsys, is_converted):
    model = converted(llama(), nystrom(4)) if is_converted else llama()
    model.save_pretrained(tmp_path / "model")
    # What is not converted gets a window of 64.
    limit, longer = (24, 40) if is_converted else (100, 120)
    main([str(tmp_path / "model"), "--exact-below", str(limit), "--lengths", f"16,{longer}", "--pairs", "2",
          "--steps", "2", "--out", str(tmp_path)])  # fmt: skip
    report = json.loads((tmp_path / RESULTS).read_text())
    assert report["provenance"]["torch"]
    assert report["check"]["length"] == limit
    assert report["check"]["error"] <= report["check"]["bound"] < report["check"]["error_of_zero"]
    assert [entry["length"] for entry in report["results"]] == [16, longer]
    for entry in report["results"]:
        for job in ("prefill", "decode"):
            assert entry[job]["ratio"]["median"] > 0
    assert f"exact_below={limit} beside 0" in capsys.readouterr().out


def test_what_would_say_nothing_is_refused():
    models, teacher = make_pair(converted(llama(), nystrom(9)), 8)
    with pytest.raises(ValueError, match="exact_below is not exact at 40 keys"):
        check(models, teacher, 40)
    with pytest.raises(ValueError, match="at 8 keys exact_below=0 is exact, too"):
        check(models, teacher, 8)
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        make_pair(bert(), 8)
