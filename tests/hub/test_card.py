"""The card and the checks that need no server: what is refused, where the licence comes from, whose README.md it is."""

import json
from pathlib import Path

import jinja2
import pytest
import torch
from huggingface_hub import ModelCard

import distattn_hf
from distattn_hf import AttentionSpec, CalibrationOptions, DistAttnConfig, convert
from distattn_hf.evaluation.scorecard import Scorecard
from distattn_hf.hub import build_card
from distattn_hf.hub.base import BaseModel
from distattn_hf.hub.card import contents, is_unedited, own_row, read_template
from distattn_hf.hub.folder import read_folder
from distattn_hf.hub.push import choose_card, push
from tests.conversion.models import bert, gpt2, t5, token_batch
from tests.conversion.nystrom_cases import taken

ROOT = Path(distattn_hf.__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_scorecard(folder: Path, **fields) -> None:
    card = {"version": 1, "task": "causal-lm", "metric": "perplexity", "rows": [{"name": "plain", "score": 3.5}]}
    (folder / "distattn_scorecard.json").write_text(json.dumps(card | fields))


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json' is not readable JSON"),
        (lambda f: DistAttnConfig(mechanism="l2").save_pretrained(f), "holds a native model, .*model.push_to_hub"),
        (lambda f: edit_config(f, distattn=None), "config.json has no 'distattn' block"),
        (lambda f: edit_config(f, auto_map={}), "names no Auto class for architectures="),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: torch.save({}, f / "pytorch_model.bin"), "'pytorch_model.bin': .* safetensors only"),
        (lambda f: (f / "distattn_report.json").write_text('{"groups": []}'), "is no conversion report"),
        (lambda f: write_scorecard(f, version=2), "version must be 1, got 2"),
        (lambda f: write_scorecard(f, metric=None), "metric must be a string, got None"),
        (lambda f: write_scorecard(f, rows=[{"name": "plain"}]), r"rows\[0\] must have a name and a number as score"),
        (
            lambda f: write_scorecard(f, rows=[{"name": "plain", "score": 1.0, "metrics": {"loss": "low"}}]),
            r"rows\[0\].metrics\['loss'\] must be a number, got 'low'",
        ),
    ],
)
def test_a_folder_that_is_not_in_order_is_refused_by_name(folder, damage, message):
    assert read_folder(folder).auto_class == "AutoModelForCausalLM"
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        push(folder, "user/x", license="mit")
    assert str(folder) in str(error.value)


def test_what_is_no_folder_and_no_repository_is_refused(folder):
    with pytest.raises(ValueError, match="is not a folder"):
        push(folder / "nowhere", "user/x", license="mit")
    for repo in ("nobody", "a/b/c", "user/with spaces"):
        with pytest.raises(ValueError, match="(?i)repo"):
            push(folder, repo, license="mit")


@pytest.mark.parametrize(
    ("build", "auto_class", "tag"),
    [(bert, "AutoModelForMaskedLM", "fill-mask"), (t5, "AutoModelForSeq2SeqLM", None)],
)
def test_the_auto_class_is_that_of_the_saved_head(tmp_path, build, auto_class, tag):
    convert(build(), AttentionSpec("l2"), init="plain").save_pretrained(tmp_path)
    card = build_card(tmp_path, "user/x", license="mit")
    assert f'{auto_class}.from_pretrained("user/x")' in card.text
    assert card.data.get("pipeline_tag") == tag


def test_every_number_of_the_report_is_in_the_card(tmp_path):
    teacher = bert()
    options = CalibrationOptions(steps=5)
    calibration = [token_batch(teacher, seed=s) for s in range(2)]
    student = convert(teacher, AttentionSpec("l2", layers=[1]), calibration=calibration, options=options)
    student.save_pretrained(tmp_path)
    report = student.conversion_report
    text = build_card(tmp_path, "user/x", license="mit").text
    assert "1 attention modules converted, 1 left as they were" in text
    assert f"mean α {report.mean_alpha:.3g}" in text
    assert "changed since" not in text
    assert "is not recorded here" not in text
    assert f"{report.mean_divergence_before:.3g} nats per query unfitted" in text
    assert f"{report.mean_divergence_after:.3g} nats per query fitted" in text
    assert f"The fit used {report.calibration_tokens:,} tokens" in text
    line = next(line for line in text.splitlines() if line.startswith("| `encoder.layer.1.attention.self`"))
    assert f"| {report.mean_divergence_after:.4g} |" in line
    assert "was not measured" in text


def test_the_row_of_the_checkpoint():
    rows = [{"name": name, "score": 1.0} for name in ("task", "teacher", "calibrated", "transfer", "no_attention")]
    assert own_row({"rows": rows})["name"] == "task"
    assert own_row({"rows": rows[1:]})["name"] == "transfer"
    assert own_row({"rows": rows, "checkpoint": "calibrated"})["name"] == "calibrated"
    assert own_row({"rows": rows[1:2]}) is None
    assert own_row(None) is None


def test_the_scorecard_that_training_writes(folder):
    scorecard = Scorecard.for_task("causal-lm", {"train": "news", "eval": "news"}, "smollm2-135m")
    scorecard.put("teacher", {"perplexity": 30.0, "loss": 3.401})
    scorecard.put("teacher_finetuned", {"perplexity": 25.0, "loss": 3.219})
    scorecard.put("calibrated", {"perplexity": 28.0, "loss": 3.332})
    scorecard.put("task", {"perplexity": 26.0, "loss": 3.258}, trained_parameters=10, tokens=4096, seconds=60.0)
    scorecard.checkpoint = "calibrated"
    scorecard.save(folder)
    card = build_card(folder, "user/x")
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"perplexity": 28.0, "loss": 3.332}
    assert "ratio to the base model so trained" in card.text
    assert "| **fitted head by head, no training (this checkpoint)** | 28 | 1.120 |" in card.text
    assert "After it" not in card.text
    scorecard.checkpoint = "task"
    scorecard.save(folder)
    text = build_card(folder, "user/x").text
    assert "up to training on the task, on news, 10 parameters trained, 4,096 tokens, 60 seconds" in text
    assert "| **training on the task (this checkpoint)** | 26 | 1.040 | 10 | 4,096 | 60 |" in text
    scorecard.data["passkey_length"] = 1024
    scorecard.put("teacher", {"perplexity": 30.0, "passkey": 1.0})
    scorecard.put("task", {"perplexity": 26.0, "passkey": 0.9}, trained_parameters=10)
    scorecard.save(folder)
    card = build_card(folder, "user/x")
    assert "| numbers found in texts of 1,024 tokens |" in card.text
    assert "| base model, as published | 30 | 1.200 | 100% | - |" in card.text
    assert "| fitted head by head, no training | 28 | 1.120 | - | - |" in card.text
    assert "| **training on the task (this checkpoint)** | 26 | 1.040 | 90% | 10 |" in card.text
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"perplexity": 26.0, "passkey": 0.9}


def test_values_that_are_not_finite_stay_out_of_the_model_index(folder):
    write_scorecard(
        folder,
        data={"eval": "news"},
        rows=[{"name": "plain", "score": float("inf"), "metrics": {"perplexity": float("inf"), "loss": 9.5}}],
    )
    card = build_card(folder, "user/x", license="mit")
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 9.5)]
    assert "| **new attention put in, nothing fitted (control) (this checkpoint)** | inf |" in card.text


def test_licence_of_the_base_model(folder, tmp_path):
    with pytest.raises(
        ValueError, match="license must be given, .* the base model's is not known .no base model was named."
    ):
        build_card(folder, "user/x")
    minilm = build_card(folder, "user/x", base_model="minilm").data
    assert (minilm.license, minilm.base_model) == ("apache-2.0", "sentence-transformers/all-MiniLM-L6-v2")
    academic = build_card(folder, "user/x", base_model="iglm").data
    assert (academic.license, academic.license_name) == ("other", "jhu-non-commercial-academic-licence")
    assert academic.base_model is None
    given = build_card(folder, "user/x", base_model="iglm", license="CC-BY-4.0").data.to_dict()
    assert (given["license"], given.get("license_name")) == ("cc-by-4.0", None)
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: bsd-3-clause\nlanguage: de\n---\n\n# base\n")
    local = build_card(folder, "user/x", base_model=str(base))
    assert (local.data.license, local.data.language, local.data.base_model) == ("bsd-3-clause", "de", None)
    assert str(tmp_path) not in str(local)


def test_a_teacher_that_nobody_knows_is_not_called_a_hub_model(folder):
    """It may have been a folder on another machine; the user, who names one, is believed. (Tests are offline.)"""
    write_scorecard(folder, teacher="out/teacher")
    with pytest.raises(ValueError, match="'out/teacher' could not be looked up at .*: OfflineModeIsEnabled"):
        build_card(folder, "user/x")
    assert build_card(folder, "user/x", license="mit").data.base_model is None
    assert build_card(folder, "user/x", license="mit", base_model="out/teacher").data.base_model == "out/teacher"


def test_a_readme_that_somebody_wrote_is_respected(folder):
    def chosen(overwrite=False):
        return choose_card(read_folder(folder), "user/x", overwrite, "mit", None, None, None)

    ours, notes = chosen()
    assert notes == []
    (folder / "README.md").write_text(ours)
    write_scorecard(folder)
    newer, notes = chosen()
    assert notes == []
    assert "| **new attention put in" in newer
    assert "| **new attention put in" not in ours
    for text in (ours.replace("# x", "# My model"), ours.replace("license: mit", "license: bsd"), "# Mine", ""):
        (folder / "README.md").write_text(text)
        kept, notes = chosen()
        assert kept == text
        assert "uploaded as it is" in notes[0]
        assert chosen(overwrite=True) == (newer, [])


def test_the_card_survives_the_hubs_own_reader(folder):
    card = build_card(folder, "user/x", license="mit")
    assert is_unedited(str(card))
    assert str(ModelCard(str(card))) == str(card)


def test_the_card_counts_the_heads_that_retrieve_beside_nystrom_heads(tmp_path):
    taken("llama", num_blocks=3).save_pretrained(tmp_path)
    text = str(build_card(tmp_path, "user/x", license="mit"))
    assert "linear-time Nyström attention" in text
    read = "each query reads the last 9 tokens, the first 2, and at most 48 others, whose weight is at least 0.003, in"
    assert f"in 4 heads retrieval attention ({read}" in text


def test_every_branch_of_the_template_renders(folder):
    """A name that the template misspells is an error there; this goes into the branches that other tests do not."""
    write_scorecard(folder, data={"train": "a", "eval": "b"}, greater_is_better=True)
    known = contents(read_folder(folder), "user/x", BaseModel())
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(read_template())
    trained = {"trained": True, "row": {"trained_parameters": 1, "tokens": 2, "seconds": 3.0}}
    for changes in ({}, trained, {"nystrom": True, "exact_heads": 2}, {"init": "exact"}, {"report": None}):
        text = template.render(card_data="license: mit", **known | changes)
        assert "{" not in text
        assert "None" not in text
    with pytest.raises(jinja2.UndefinedError):
        template.render(card_data="license: mit", **{k: v for k, v in known.items() if k != "nystrom"})


def test_results_of_the_owner_are_shown_as_theirs(folder, tmp_path):
    given = [
        {"dataset": "sts | b", "metric": "spearman", "value": 0.8123, "base": 0.83},
        {"dataset": "mine", "metric": "mrr", "value": 1, "note": "100 questions"},
    ]
    (tmp_path / "results.json").write_text(json.dumps(given))
    text = build_card(folder, "user/x", license="mit", results=tmp_path / "results.json").text
    assert "Results that the owner of this model gives, not measured or checked by the package:" in text
    assert "| dataset | metric | this model | base model | note |" in text
    assert "| sts \\| b | spearman | 0.8123 | 0.83 | - |" in text
    assert "| mine | mrr | 1 | - | 100 questions |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one result"),
        ({"metric": "mrr"}, "must hold a JSON list, got dict"),
        ([{"dataset": "a", "metric": "b", "value": "0.5"}], "entry 0: value must be a finite number, got '0.5'"),
        ([{"dataset": "a", "metric": "b", "value": float("inf")}], "entry 0: value must be a finite number, got inf"),
        ([{"dataset": "a", "metric": "b", "value": 10**400}], "entry 0: value must be a finite number, got 1000"),
        ([3], "entry 0 must be an object, got 3"),
        ([{"dataset": "a", "value": 1}], "entry 0: metric must be text, got None"),
        (
            [{"dataset": "a", "metric": "b", "value": 1, "score": 2}],
            "unknown field 'score'; allowed are dataset",
        ),
    ],
)
def test_results_that_cannot_be_shown_are_refused(folder, tmp_path, given, message):
    (tmp_path / "results.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        build_card(folder, "user/x", license="mit", results=tmp_path / "results.json")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("processor_config.json", "{}", "AutoProcessor"),
        ("preprocessor_config.json", "{}", "AutoImageProcessor"),
        ("preprocessor_config.json", '{"feature_extractor_type": "X"}', "AutoFeatureExtractor"),
    ],
)
def test_both_snippets_load_what_prepares_the_inputs(folder, file, content, expected):
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / file).write_text(content)
    text = build_card(folder, "user/x", license="mit").text
    # Without the package this asks before it runs the repository's code, too.
    for arguments in ('"user/x"', '"user/x", trust_remote_code=True'):
        assert text.count(f"{expected}.from_pretrained({arguments})") == 1
