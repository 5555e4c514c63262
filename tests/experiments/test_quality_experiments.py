"""Experiments on real checkpoints, `distattn experiment NAME`, with tiny models in their place: what rows there are."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distattn_hf.core.kernel_cpp_library import compiler
from distattn_hf.data.packing import pack
from distattn_hf.data.sources import read_texts
from distattn_hf.evaluation.score import EvaluationOptions, evaluate_model
from distattn_hf.experiments import conversion_quality, nystrom_quality, quantised, speech
from distattn_hf.experiments.run_experiment import load_experiment, read_options, run_experiment
from distattn_hf.storage.models import load_checkpoint
from tests.fixtures.load import GPT2_ENGLISH, gpt2_english


def task():
    """The self-trained GPT-2, and its perplexity on a text."""
    teacher, tokenizer, texts = gpt2_english()
    options = EvaluationOptions(max_length=128, max_tokens=256, progress=False)

    def score(model):
        return {"perplexity": evaluate_model(model, tokenizer, texts[1:], options=options)["perplexity"]}

    return teacher, tokenizer, texts[:1], score


def test_conversion_quality(tmp_path, monkeypatch):
    """Breaks if a fit is another's: the plain distance loses more than one with an ε, and less than without a fit."""
    monkeypatch.setitem(conversion_quality.CHECKPOINTS, "smollm2", task)
    run_experiment("conversion_quality", tmp_path, quick=True, echo=lambda line: None)
    given = ["metrics=l2", "fits=swapped,plain,0.004,0", "transform=scalar", "steps=2"]
    with pytest.raises(ValueError, match="transform is 'scalar', and .* holds rows of transform=None"):
        run_experiment("conversion_quality", tmp_path, given, quick=True)
    said = []
    rows = run_experiment("conversion_quality", tmp_path / "all", given, quick=True, echo=said.append).rows
    l2 = [("l2", fit) for fit in ("swapped", "plain", 0.004, 0)]
    assert [(row["attention"], row["fit"]) for row in rows] == [("teacher", None), *l2]
    teacher, swapped, plain, default, nearest = rows
    for row in rows[1:]:
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / teacher["perplexity"])
    assert swapped["perplexity_ratio"] > 1.02
    assert swapped["perplexity"] > plain["perplexity"] > default["perplexity"]
    assert (plain["softening_ratio"], swapped["softening_ratio"]) == (None, None)
    # A budget of nothing allows no plainer distance than the best fit.
    assert nearest["softening_ratio"] > default["softening_ratio"] > 0
    given = ["metrics=sqeuclidean", "fits=0.004", *given[2:]]
    assert run_experiment("conversion_quality", tmp_path / "all", given, quick=True, echo=said.append).rows == rows
    assert said[-1].startswith("left out: sqeuclidean, 0.004: it takes no ε")
    model, _, _, score = task()
    assert teacher["perplexity"] == pytest.approx(score(model)["perplexity"])


def test_conversion_quality_of_an_encoder_decoder(tmp_path):
    """Scored on every second pair of its own file."""
    folder = Path(GPT2_ENGLISH).parent / "t5-g2p"
    with pytest.raises(ValueError, match="checkpoint must be one of .*, smollm2 or a folder with heldout.tsv"):
        read_options(load_experiment("conversion_quality"), None, [f"checkpoint={folder.parent}"])
    given = [f"checkpoint={folder}", "metrics=sqeuclidean"]
    teacher, swapped = run_experiment("conversion_quality", tmp_path, given, quick=True).rows
    assert swapped["perplexity"] > 1.2 * teacher["perplexity"]
    pairs = [tuple(line.split("\t")) for line in (folder / "heldout.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    model, tokenizer = load_checkpoint(folder)
    options = EvaluationOptions(progress=False)
    expected = evaluate_model(model, tokenizer, [], pairs=pairs[1::2], options=options)["perplexity"]
    assert teacher["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_nystrom_quality(tmp_path, monkeypatch):
    monkeypatch.setitem(nystrom_quality.CHECKPOINTS, "smollm2", lambda: (*task(), {"window_size": 8}))
    fits = []
    monkeypatch.setattr(
        nystrom_quality, "convert", lambda *a, convert=nystrom_quality.convert, **k: fits.append(1) or convert(*a, **k)
    )
    rows = run_experiment("nystrom_quality", tmp_path, ["max_errors=0.2"], quick=True).rows
    assert [(row["attention"], row.get("max_error")) for row in rows] == [
        ("teacher", None), ("window only", None), ("nystrom", None), ("nystrom", 0.2),
    ]  # fmt: skip
    teacher, control, whole, limited = (math.log(row["perplexity"]) for row in rows)
    assert rows[2]["gap_closed"] == pytest.approx((control - whole) / (control - teacher))
    assert rows[3]["nystrom_heads"] < rows[2]["nystrom_heads"]
    assert abs(limited - teacher) < abs(whole - teacher)
    assert len(fits) == 1


def test_model_speed_to_see_it_run_needs_no_checkpoint(tmp_path):
    rows = run_experiment("model_speed", tmp_path, quick=True, echo=lambda line: None).rows
    assert [row["attention"] for row in rows] == 3 * ["untouched", "l2", "retrieval"]
    assert all(row["seconds"] > 0 for row in rows)
    with pytest.raises(ValueError, match="data must be None with checkpoint='random'"):
        read_options(load_experiment("model_speed"), None, ["data=news"], quick=True)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler here")
def test_retrieval_speed(tmp_path):
    """Also gone on with. Breaks if a job is the other's, or a ratio is upside down."""
    run_experiment("retrieval_speed", tmp_path, quick=True, echo=lambda line: None)
    rows = run_experiment("retrieval_speed", tmp_path, ["lengths=512,48"], quick=True, echo=lambda line: None).rows
    expected = [(n, order, job) for n in (512, 48) for order in (True, False) for job in ("prefill", "step")]
    assert [(row["length"], row["cluster_keys"], row["job"]) for row in rows] == expected
    for row in rows:
        assert row["p10"] <= row["ratio"] <= row["p90"]
        if row["job"] == "prefill":  # of one pair
            assert row["ratio"] == pytest.approx(row["sdpa_seconds"] / row["seconds"])


def test_quantised(tmp_path, monkeypatch):
    given = [f"checkpoint={GPT2_ENGLISH}", "data=README.md", "attentions=untouched,exact,retrieval"]
    rows = run_experiment("quantised", tmp_path, given, quick=True, echo=lambda line: None).rows
    teacher, tokenizer, _ = gpt2_english()
    ids = pack(tokenizer, read_texts("README.md", split="test"), 36, 36)[0][:1]
    with torch.no_grad():
        logits = teacher(ids).logits[0, 31:-1]
    expected = float(torch.nn.functional.cross_entropy(logits, ids[0, 32:]).exp())
    for row in rows:
        assert row["perplexity"] == pytest.approx(expected, rel=1e-3), "it reads most of the keys"
        assert row["weight_bytes"] == 4 * sum(p.numel() for p in teacher.parameters())
        heads = 2 * teacher.config.n_layer * teacher.config.n_embd
        assert row["cache_bytes"] == 4 * 35 * heads
    with pytest.raises(ValueError, match="has no linear layers of PyTorch whose weights could have 8 bits"):
        run_experiment("quantised", tmp_path / "gpt2", [*given, "parts=weights"], quick=True)
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="parts: 'cache' needs hqq; run: pip install"):
        run_experiment("quantised", tmp_path / "none", [*given, "parts=cache"], quick=True)


def test_digits(tmp_path):
    """The whole chain: a ViT trained here, converted, adapted and scored by `adapt`."""
    rows = run_experiment("digits", tmp_path, quick=True, echo=lambda line: None).rows
    (row,) = rows
    names = ("teacher", "calibrated", "distillation", "window_only")
    assert all(0 <= row[f"{name}_accuracy"] <= 1 for name in names)
    assert row["calibrated_accuracy"] == pytest.approx(row["teacher_accuracy"], abs=0.1), "it reads most of the keys"
    assert load_checkpoint(tmp_path / "retrieval" / "student")[0].config.num_labels == 10
    with pytest.raises(ValueError, match="attentions must be among l2; l1; "):
        read_options(load_experiment("digits"), None, ["attentions=l3"])


def test_speech(tmp_path):
    """The whole chain: sounds, a Whisper trained here, converted, adapted, scored and generating."""
    (row,) = run_experiment("speech", tmp_path, quick=True, echo=lambda line: None).rows
    names = ("teacher_accuracy", "calibrated_accuracy", "distillation_accuracy", "plain_accuracy")
    assert all(0 <= row[name] <= 1 for name in (*names, "teacher_right", "distillation_right"))
    assert row["calibrated_accuracy"] == pytest.approx(row["teacher_accuracy"], abs=0.05)
    student = load_checkpoint(tmp_path / "l2" / "student")[0]
    assert {spec.metric for spec in student.config.attention_specs} == {"l2"}
    with pytest.raises(ValueError, match="attentions must be among l2; l1; "):
        read_options(load_experiment("speech"), None, ["attentions=l3"])


def test_what_is_said_is_what_is_scored():
    spectra, labels = speech.strings(6, seed=3)
    again, other = speech.strings(6, seed=3), speech.strings(6, seed=4)
    assert spectra.shape == (6, 40, 100)
    assert (again[0] == spectra).all()
    assert (again[1], other[1] == labels) == (labels, False)
    assert all(2 <= len(row) <= 4 and row[-1] == speech.END and max(row[:-1]) < 10 for row in labels)
    # A syllable is loudest near its first resonance; of 1 it rises from 300 Hz to 650, of 5 it falls from 750 to 300.
    for digit, begins_higher in ((1, False), (5, True)):
        wave = speech.say([digit], np.random.default_rng(0))
        sounding = np.flatnonzero(np.abs(wave) > 0.1)
        halves = np.array_split(wave[sounding[0] : sounding[-1]], 2)
        powers = [np.abs(np.fft.rfft(half, 4000)[:500]) ** 2 for half in halves]  # up to 1,000 Hz
        centres = [float((power * np.arange(500)).sum() / power.sum()) for power in powers]
        assert (centres[0] > centres[1]) == begins_higher

    class Writes:
        def generate(self, spectra, **options):
            return torch.tensor(self.rows)

    model = Writes()
    width = max(map(len, labels)) - 1  # as Whisper gives them
    model.rows = [(row + [speech.END] * width)[:width] for row in labels]
    assert speech.right(model, spectra, labels) == 1.0
    model.rows[2][0] = (model.rows[2][0] + 1) % 10
    assert speech.right(model, spectra, labels) == pytest.approx(5 / 6)


def test_model_speed(tmp_path):
    rows = run_experiment("model_speed", tmp_path, [f"checkpoint={GPT2_ENGLISH}"], quick=True).rows
    assert [(row["job"], row["attention"]) for row in rows] == [
        (job, name) for job in ("prefill", "step", "generate") for name in ("untouched", "l2", "retrieval")
    ]
    assert [row["ratio"] for row in rows[::3]] == [1.0, 1.0, 1.0]
    for reference, *others in zip(rows[::3], rows[1::3], rows[2::3]):
        for row in others:
            assert row["ratio"] == pytest.approx(row["seconds"] / reference["seconds"])


def test_model_speed_of_nystrom_says_what_its_cache_holds(tmp_path):
    """Up to `exact_below` a cache keeps every key; without it, one size. Breaks if the two are the same model."""
    given = ["attentions=nystrom,nystrom+exact", "exact_below=200", "prefill_tokens=160"]
    rows = run_experiment("model_speed", tmp_path, given, quick=True, echo=lambda line: None).rows
    sizes = {row["attention"]: row["cache_bytes"] for row in rows if row["job"] == "prefill"}
    # Two layers, two key heads of 16, key and value in float32.
    assert sizes["untouched"] == 2 * 2 * 2 * 16 * 4 * 160
    longer = run_experiment("model_speed", tmp_path / "b", [*given, "prefill_tokens=180"], quick=True).rows
    more = {row["attention"]: row["cache_bytes"] for row in longer if row["job"] == "prefill"}
    assert more["nystrom"] == sizes["nystrom"]
    assert more["nystrom+exact"] > sizes["nystrom+exact"]
    assert all("cache_bytes" not in row for row in rows if row["job"] != "prefill")


def test_model_speed_reads_the_text_it_is_given(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 10, encoding="utf-8")
    given = [f"checkpoint={GPT2_ENGLISH}", f"data={text}", "attentions=retrieval"]
    assert run_experiment("model_speed", tmp_path / "a", [*given, "prefill_tokens=32"], quick=True).rows
    with pytest.raises(ValueError, match="prefill_tokens must be at most the .* tokens of .*text.txt', got 200"):
        run_experiment("model_speed", tmp_path / "b", [*given, "prefill_tokens=200"], quick=True)
    with pytest.raises(ValueError, match=r"prefill_tokens \+ new_tokens must be at most the 256 positions of"):
        run_experiment("model_speed", tmp_path / "c", [*given, "prefill_tokens=256"], quick=True)


def test_sinks_and_caps(tmp_path):
    """The exact conversion is the teacher, and a resumed run trains the same one."""
    given = [f"data={GPT2_ENGLISH / 'heldout.txt'}", "attentions=l2"]
    teacher, exact, l2 = run_experiment("sinks_and_caps", tmp_path / "a", given, quick=True).rows
    assert exact["perplexity"] == pytest.approx(teacher["perplexity"], rel=1e-4)
    assert l2["ratio"] == pytest.approx(l2["perplexity"] / teacher["perplexity"])
    assert l2["plain"] != l2["perplexity"]
    run_experiment("sinks_and_caps", tmp_path / "b", [given[0], "attentions=[]"], quick=True)
    assert run_experiment("sinks_and_caps", tmp_path / "b", given, quick=True).rows == [teacher, exact, l2]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("conversion_quality", "checkpoint=gpt2", "checkpoint must be one of iglm, minilm, smollm2 or a folder with"),
        ("conversion_quality", "fits=exact", "fits must be among swapped, plain and numbers of nats, got 'exact'"),
        ("conversion_quality", "fits=-0.1", "divergence_budget must be >= 0 nats, got -0.1"),
        ("conversion_quality", "transform=map", "transform must be one of none, scalar, maps or null, got 'map'"),
        ("nystrom_quality", "max_errors=-1", "max_error must be"),
        ("nystrom_quality", "checkpoint=gpt2", "checkpoint must be one of iglm, minilm, smollm2, got 'gpt2'"),
        ("sinks_and_caps", "kinds=bias", "kinds must be among sinks; caps, got 'bias'"),
        ("sinks_and_caps", "steps=0", "steps must be >= 1, got 0"),
        ("model_speed", "rounds=0", "rounds must be >= 1, got 0"),
        ("retrieval_speed", "key_heads=5", "key_heads must divide heads=2, got 5"),
        ("retrieval_speed", "pairs=0", "pairs must be >= 1, got 0"),
        ("model_speed", "prompt_tokens=128", "prompt_tokens must be at most prefill_tokens, got 128"),
    ],
)
def test_bad_options(tmp_path, name, given, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(name, tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_reads_few_keys(tmp_path):
    """Breaks if the two students read other numbers of keys, or if the blocks are not the best ones."""
    given = ["block_sizes=4,8", "length=96"]
    rows = run_experiment("encoder_retrieval", tmp_path, given, quick=True, echo=lambda line: None).rows
    retrieval, window = rows[:2], rows[2:]
    assert [row["student"] for row in rows] == ["retrieval"] * 2 + ["window"] * 2
    # The first tokens' own block is the first block, too, and a window ends with the text.
    assert all(0.8 * 32 < row["keys_read"] <= 32 for row in rows)
    assert all(mine["cosine"] > control["cosine"] + 0.01 for mine, control in zip(retrieval, window, strict=True))
    given = ["block_sizes=8", "length=24", "students=retrieval"]
    (whole,) = run_experiment("encoder_retrieval", tmp_path / "all", given, quick=True, echo=lambda line: None).rows
    assert (whole["keys_read"], whole["cosine"]) == (24, pytest.approx(1.0, abs=1e-5))
    for bad, message in (
        ("block_sizes=16", "block_sizes must divide keys / 2 = 16, twice or more, got 16"),
        ("keys=0", "keys must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run_experiment("encoder_retrieval", tmp_path / "bad", [bad], quick=True)
    with pytest.raises(ValueError, match="data has 0 texts of length=9000000 tokens"):
        run_experiment("encoder_retrieval", tmp_path / "long", ["length=9000000"], quick=True)
