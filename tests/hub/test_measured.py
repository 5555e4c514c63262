"""What `distattn evaluate --out` measured of a folder goes into its card, and of no other."""

import json
import shutil
from statistics import fmean

import pytest
from huggingface_hub import ModelCard

from distattn_hf import convert
from distattn_hf.hub import build_card
from distattn_hf.storage.files import checkpoint_digest
from distattn_hf.storage.folders import save_checkpoint
from tests.fixtures.load import GPT2_ENGLISH, gpt2_english
from tests.test_cli import distattn

DATA = GPT2_ENGLISH / "heldout.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, and what was measured of it in DIR/measured: numbers, perplexity at lengths, and of a text."""
    folder = tmp_path_factory.mktemp("measured")
    teacher, tokenizer, _ = gpt2_english()
    save_checkpoint(convert(teacher, "retrieval"), tokenizer, folder / "student")
    given = ("evaluate", folder / "student", "--against", GPT2_ENGLISH, "--data", DATA, "--out", folder / "measured")
    lengths = ("--lengths", "120,200", "--samples", "2")
    distattn(*given, "--task", "kv", *lengths, "--depths", "0,1", "--control")
    distattn(*given, "--task", "perplexity", *lengths, "--tail", "32")
    distattn(*given, "--max-length", "64", "--max-tokens", "256")
    # So small a model finds nothing: numbers that differ from row to row, so that none can stand for another.
    kv = json.loads(files(folder)[0].read_text())
    for number, row in enumerate(kv["rows"]):
        row["exact"] = (number + 1) / 16
    files(folder)[0].write_text(json.dumps(kv))
    return folder


def files(folder) -> list:
    return [folder / "measured" / f"{name}.json" for name in ("kv", "perplexity", "text")]


def card_of(folder, results) -> ModelCard:
    return build_card(folder / "student", "user/x", license="mit", results=results)


def test_its_numbers_are_in_tables_and_metadata(folder):
    """Beside the teacher's and the control's, each the mean over depths."""
    kv, perplexity, text = (json.loads(file.read_text()) for file in files(folder))
    card = card_of(folder, files(folder))
    student = str(folder / "student")

    def shown(content, name, model, length=None):
        return fmean(r[name] for r in content["rows"] if r["model"] == model and r.get("length") in (None, length))

    for label, model in (("**this checkpoint**", student), ("teacher", str(GPT2_ENGLISH)),
                         ("sinks and window alone (control)", f"{student}, sinks and window")):  # fmt: skip
        cells = " | ".join(f"{shown(kv, 'exact', model, length):.0%}" for length in (120, 200))
        assert f"| {label} | {cells} |" in card.text
    cells = " | ".join(f"{shown(perplexity, 'perplexity', student, length):.4g}" for length in (120, 200))
    assert f"| **this checkpoint** | {cells} |" in card.text
    assert (
        "Values found by their keys, by tokens of the text, 2 texts a length at each of 2 depths, on heldout.txt:"
        in card.text
    )
    own = next(row for row in text["rows"] if row["model"] == student)
    assert f"| **this checkpoint** | {own['perplexity']:.4g} | {own['loss']:.4g} |" in card.text
    assert "The quality of this checkpoint was not measured" not in card.text
    assert str(folder) not in str(card)
    # As the Hub reads it: one entry for each configuration.
    read = ModelCard(str(card))
    index = read.data.to_dict()["model-index"][0]["results"]
    values = {(r["dataset"]["config"], m["type"]): m["value"] for r in index for m in r["metrics"]}
    assert len(values) == sum(len(r["metrics"]) for r in index)
    assert values == {
        **{(f"kv, {n} tokens", "exact_match"): shown(kv, "exact", student, n) for n in (120, 200)},
        **{(f"perplexity, {n} tokens", "perplexity"): shown(perplexity, "perplexity", student, n) for n in (120, 200)},
        ("text", "perplexity"): own["perplexity"],
        ("text", "loss"): own["loss"],
    }
    assert read.data.metrics == ["exact_match", "perplexity", "loss"]
    assert {r["dataset"]["name"] for r in index} == {"heldout.txt"}


def test_an_owners_own_results_stand_beside_them(folder, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps([{"dataset": "mine", "metric": "mrr", "value": 1}]))
    text = distattn(
        "push", folder / "student", "user/x", "--license", "mit", "--dry-run", "--results", mine, "--results",
        folder / "measured" / "kv.json",
    ).stdout  # fmt: skip
    assert "| mine | mrr | 1 |" in text
    assert "Values found by their keys" in text


def test_measurements_of_other_weights_are_refused(folder, tmp_path):
    """Another attention of the same weights, too."""
    assert checkpoint_digest(GPT2_ENGLISH / "nowhere") is None
    copy = shutil.copytree(folder / "student", tmp_path / "student")
    build_card(copy, "user/x", license="mit", results=files(folder))
    config = json.loads((copy / "config.json").read_text())
    config["distattn"]["specs"][0]["num_blocks"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="kv.json' was measured of .*student', whose weights, config, tokenizer or pooling are not"
    ):
        build_card(copy, "user/x", license="mit", results=files(folder))


def rewrite(file, change) -> None:
    data = json.loads(file.read_text()) if file.is_file() else {}
    change(data)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data))


OTHER_NUMBERS = {
    "position base": ("config.json", lambda c: c.update(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
    "soft cap": ("config.json", lambda c: c.update(attn_logit_softcapping=5.0)),
    "sliding window": ("config.json", lambda c: c.update(sliding_window=8)),
    "attention": ("config.json", lambda c: c["distattn"]["specs"][0].update(num_sinks=1)),
    "tokenizer": ("tokenizer.json", lambda c: c.update(truncation={"max_length": 8})),
    "tokenizer's settings": ("tokenizer_config.json", lambda c: c.update(add_bos_token=True)),
    "generation": ("generation_config.json", lambda c: c.update(eos_token_id=3)),
    "pooling": ("1_Pooling/config.json", lambda c: c.update(pooling_mode_cls_token=True)),
    "a dense module": ("2_Dense/model.safetensors", lambda c: c.update(changed=1)),
    "its settings": ("sentence_bert_config.json", lambda c: c.update(max_seq_length=8)),
}
SAME_NUMBERS = {
    "versions": ("config.json", lambda c: c.update(transformers_version="1", _name_or_path="x", dtype="bfloat16")),
    "code": ("config.json", lambda c: c.update(auto_map={})),
    "order": ("config.json", lambda c: c.update({name: c.pop(name) for name in sorted(c, reverse=True)})),
    "generation's version": ("generation_config.json", lambda c: c.update(transformers_version="1")),
    "licence": ("LICENSE.json", lambda c: c.update(mit=True)),
    "card": ("README.md", lambda c: c.update(a=1)),
    "an older export": ("onnx/config.json", lambda c: c.update(a=1)),
}


@pytest.mark.parametrize("name", [*OTHER_NUMBERS, *SAME_NUMBERS])
def test_what_changes_the_numbers_changes_the_digest(folder, tmp_path, name):
    copy = shutil.copytree(folder / "student", tmp_path / "student")
    (copy / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    rewrite(copy / "1_Pooling" / "config.json", lambda c: c.update(pooling_mode_mean_tokens=True))
    before = checkpoint_digest(copy)
    file, change = (OTHER_NUMBERS | SAME_NUMBERS)[name]
    rewrite(copy / file, change)
    assert (checkpoint_digest(copy) == before) == (name in SAME_NUMBERS)


def test_nothing_is_told_twice(folder):
    kv = files(folder)[0]
    with pytest.raises(
        ValueError, match="kv.json' measures 'kv, 120 tokens' on .*heldout.txt', as a file before it does"
    ):
        card_of(folder, [*files(folder), kv])


ROW = {"model": "M", "length": 8, "exact": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "luck"}, "task must be one of passkey, .*, got 'luck'"),
        ({"model": None}, "model must be text, got None"),
        ({"rows": []}, r"rows must be rows, got \[\]"),
        ({"digest": None}, "was measured of .* whose weights, config, tokenizer or pooling are not those of folder"),
        ({"rows": [{"model": "M", "length": 8}]}, r"rows\[0\].exact must be a number from 0 to 1, got None"),
        ({"rows": [{"model": "other", "length": 8, "exact": 1}]}, r"rows\[0\].model must be one of 'M'.*, got 'other'"),
        ({"rows": [{"model": "M", "length": "8", "exact": 1}]}, r"rows\[0\].length must be an integer >= 1"),
        ({"rows": [{"model": "M, sinks and window", "length": 8, "exact": 1}]}, "has no row of 'M' itself"),
        ({"rows": [ROW, 3]}, r"rows\[1\] must be an object, got 3"),
        ({"rows": [ROW | {"model": ["M"]}]}, r"rows\[0\].model must be one of 'M'.*, got \['M'\]"),
        ({"rows": [ROW | {"length": [8]}]}, r"rows\[0\].length must be an integer >= 1, got \[8\]"),
        ({"rows": [ROW | {"samples": [8]}]}, r"rows\[0\].samples must be an integer >= 1, got \[8\]"),
        ({"rows": [ROW | {"exact": 7.0}]}, r"rows\[0\].exact must be a number from 0 to 1, got 7.0"),
        ({"rows": [ROW | {"exact": float("inf")}]}, r"rows\[0\].exact must be a number from 0 to 1, got inf"),
        ({"rows": [ROW | {"exact": 10**400}]}, r"rows\[0\].exact must be a number from 0 to 1, got 1000"),
        ({"rows": [ROW | {"exact": True}]}, r"rows\[0\].exact must be a number from 0 to 1, got True"),
        (
            {"task": "perplexity", "rows": [ROW | {"perplexity": -1}]},
            "perplexity must be a finite number >= 0",
        ),
        ({"task": "text", "rows": [3]}, r"rows\[0\] must be an object, got 3"),
        ({"task": "text", "rows": [ROW]}, "rows must have one of perplexity, loss, retrieval_at_1, mrr, got"),
        ({"task": "text", "rows": [ROW | {"mrr": 7}]}, r"rows\[0\].mrr must be a number from 0 to 1, got 7"),
        ({"task": "classification", "rows": [ROW | {"f1": -1}]}, r"rows\[0\].f1 must be a number from 0 to 1, got -1"),
        ({"against": ["T"]}, r"against must be text, got \['T'\]"),
        ({"depths": 3}, "depths must be a list, got 3"),
    ],
)
def test_files_that_are_not_whole_are_refused(folder, tmp_path, change, message):
    content = json.loads((folder / "measured" / "kv.json").read_text()) | {"model": "M"} | change
    (file := tmp_path / "kv.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        card_of(folder, file)
    assert "kv.json" in str(error.value)
