"""The whole analysis: what is written, what the page holds, and that bad input leaves nothing behind."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.analysis.analyse import (
    AnalyseOptions,
    Analysis,
    analyse,
    analyse_models,
    parse_heads,
    write_analysis,
)
from distattn_hf.analysis.figure_style import inline_svg, save_figure
from distattn_hf.analysis.report import figures as draw
from distattn_hf.analysis.report.compared import conversion_section
from distattn_hf.analysis.report.heads import rank_correlation
from distattn_hf.analysis.report.page import build_sections, render
from distattn_hf.analysis.report.parts import number
from distattn_hf.analysis.statistics import measure
from distattn_hf.cli import app
from distattn_hf.evaluation.scorecard import Scorecard
from distattn_hf.storage.folders import staging_folder
from tests.analysis.models import hand_built, letter_tokenizer
from tests.conversion.models import FAMILIES, gpt2, token_batch
from tests.fixtures.load import GPT2_ENGLISH

WICKED = "</script><img src=https://x.y/z>"
TEXTS = [f"a b a {WICKED} b . c d", "c d c d e f g h", "e f e f . a"]
OPTIONS = AnalyseOptions(max_length=16, map_tokens=8)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a teacher and of its conversion, with a scorecard."""
    folder = tmp_path_factory.mktemp("checkpoints")
    teacher, tokenizer = gpt2(), letter_tokenizer()
    tokenizer.add_tokens([WICKED])
    student = convert(teacher, AttentionSpec("l2", transform="scalar"), init="plain")
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    card = Scorecard.for_task("causal-lm", {"train": "a", "eval": "b"}, "the teacher <b>")
    card.put("teacher", {"perplexity": 4.0})
    card.put("calibrated", {"perplexity": 5.0})
    card.checkpoint = "calibrated"
    card.save(folder / "student")
    return folder


@pytest.fixture(scope="module")
def written(checkpoints):
    """The folder that a full analysis of the student beside its teacher wrote, and what it returned."""
    out = checkpoints / "report"
    found = analyse(
        checkpoints / "student", TEXTS, out, against=checkpoints / "teacher", options=OPTIONS
    )  # fmt: skip
    return out, found


class Resources(HTMLParser):
    """Every address that a page would load, and whether its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.text, self.ids = [], [], "", []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_loads_nothing(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    page = Resources()
    page.feed(text)
    assert page.open == [], "every tag is closed"
    assert page.addresses
    assert all(a.startswith(("#", "data:")) for a in page.addresses), page.addresses
    assert {a[1:] for a in page.addresses if a.startswith("#part")} <= set(page.ids)
    assert not re.search(r"url\((?!#)|@import|<script|<img", text), "the text's own tags are shown, not run"
    assert WICKED in page.text, "the user's text is there"
    assert "http" not in text.replace("https://x.y/z&gt;", ""), "no other address"


def test_the_page_says_the_numbers_that_were_measured(written):
    out, found = written
    page = Resources()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    heads = sorted(found.comparison.heads, key=lambda h: -h.divergence)
    assert f"({heads[0].divergence:.3g})" in page.text
    ranked = found.importance["ablation"].ranking()[0]
    assert f"head {ranked[1]} with {ranked[2]:.3g} nats" in page.text
    assert "2 attention modules, init=plain" in page.text, "the conversion report is part of it"
    assert "scores 5, the teacher 4: 1.25 times as much" in page.text, "so is the scorecard"
    for head in found.statistics.heads:
        assert head.module in page.text
    for title in ("The conversion", "The scorecard", "Teacher and student", "Patterns", "Which heads matter"):
        assert title in page.text


def test_files_are_complete(written):
    out, found = written
    data = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert Analysis.from_dict(data) == found
    assert Analysis.from_dict(data).to_dict() == data
    assert len((out / "heads.csv").read_text().splitlines()) == 1 + 8
    stems = {path.stem for path in (out / "figures").iterdir()}
    assert {"parameters", "divergence", "by_position", "curves", "patterns", "maps", "rollout"} <= stems
    for stem in stems:
        assert (out / "figures" / f"{stem}.svg").read_text().startswith("<?xml")
        assert (out / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.parent.glob(".report.*"))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_other_families(family, tmp_path):
    """Masked and encoder-decoder models; without a teacher, and without a loss where the tokenizer has no mask."""
    model, tokenizer = FAMILIES[family](), letter_tokenizer()
    found, example = analyse_models(model, tokenizer, TEXTS, options=OPTIONS)
    write_analysis(found, example, tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert len(found.statistics.modules) == (6 if family == "t5" else 2)
    if family == "bert":
        assert found.importance == {}
        assert "Importance of heads was not measured: the tokenizer has no mask token" in found.notes[0]
    else:
        assert set(found.importance) == {"gradient", "ablation"}


def test_a_page_without_maps():
    """What `analysis.json` holds is enough for all but the maps."""
    found, _ = analyse_models(hand_built(), letter_tokenizer(), TEXTS[:1], options=OPTIONS)
    sections = build_sections(Analysis.from_dict(json.loads(json.dumps(found.to_dict()))))
    assert [s.title for s in sections] == ["What the heads look like", "Patterns", "Which heads matter", "All heads"]
    assert "previous token" in render(found, sections)


def test_the_command_line(checkpoints, tmp_path):
    arguments = ["analyse", str(checkpoints / "student"), "--text", "a b c d a b", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--no-importance", "--heads", "1:2"])
    assert result.exit_code == 0, result.output
    assert "8 heads in 2 modules, over 6 tokens of 1 text" in result.output
    assert (tmp_path / "out" / "figures" / "map_1_2.png").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": ["", " "]}, ValueError, "text is empty"),
        ({"texts": []}, ValueError, "text is empty"),
        ({"options": AnalyseOptions(heads={9: [0]})}, ValueError, "there is no layer or module 9"),
        ({"options": AnalyseOptions(heads={0: [4]})}, ValueError, "there is no head 4 in 'h.0.attn'"),
        ({"out": "/proc/nothing/report"}, ValueError, "output folder '/proc/nothing/report' cannot be written"),
        ({"out": "teacher/config.json"}, ValueError, "is a file; give a folder"),
        ({"out": "teacher/config.json/report"}, ValueError, "cannot be written"),
        ({"out": "teacher"}, ValueError, "is not empty; pass --overwrite"),
        ({"out": "teacher", "overwrite": True}, ValueError, "is not replaced: it has no analysis.json"),
        ({"path": "nothing/at/all"}, ValueError, "does not exist"),
        ({"against": "other"}, ValueError, "tokenizers with different vocabularies"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(change, error, message, checkpoints, tmp_path, monkeypatch):
    from distattn_hf.analysis import analyse as module

    if "against" in change:
        gpt2().save_pretrained(checkpoints / "other")
        letter_tokenizer(mask_token="[MASK]").save_pretrained(checkpoints / "other")

    def measured(*args, **kwargs):
        raise AssertionError("something was measured")

    monkeypatch.setattr(module, "measure", measured)
    arguments = {"path": "student", "texts": TEXTS, "out": "new", **change}
    for name in ("path", "against"):
        if name in arguments and "/" not in arguments[name]:
            arguments[name] = str(checkpoints / arguments[name])
    out = arguments["out"]
    arguments["out"] = out if out.startswith("/") else (checkpoints if "teacher" in out else tmp_path) / out
    files = sorted(checkpoints.rglob("*"))
    with pytest.raises(error, match=re.escape(message)):
        analyse(arguments.pop("path"), arguments.pop("texts"), arguments.pop("out"), **arguments)
    assert list(tmp_path.iterdir()) == []
    assert sorted(checkpoints.rglob("*")) == files


def test_a_model_without_attention_weights_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=4)).eval()
    with pytest.raises(ValueError, match="no attention weights available from this model"):
        analyse_models(model, letter_tokenizer(), TEXTS, options=OPTIONS)


def _write_and_break(out):
    with staging_folder(out, overwrite=True, marker="old") as folder:
        (folder / "new").write_text("new")
        raise RuntimeError("midway")


def test_an_error_midway_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(RuntimeError, match="midway"):
        _write_and_break(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "old"
    with staging_folder(out, overwrite=True, marker="old") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_heads_are_read_from_the_command_line():
    assert parse_heads(["3:5", "3:0", "1:2"]) == {3: [5, 0], 1: [2]}
    assert parse_heads(None) is None
    for wrong in ("3", "a:b", "-1:2", "1:"):
        with pytest.raises(ValueError, match="heads must be layer:head"):
            parse_heads([wrong])
    result = CliRunner().invoke(app, ["analyse", "x", "--out", "y"])
    assert str(result.exception) == "give either --text or --data"


def test_the_dial_of_softened_heads(tmp_path):
    """Each head is a line from its plain distance to what was fitted; the table says both ends."""
    calibration = [token_batch(gpt2(), seed=seed) for seed in range(2)]
    options = CalibrationOptions(steps=2, progress=False)
    report = convert(gpt2(), AttentionSpec("l2"), calibration=calibration, options=options).conversion_report
    section = conversion_section(report.to_dict())
    assert section.table[0][-2:] == ["mean ε/median", "KL plain"]
    assert section.table[1][-1] == number(sum(report.groups[0].divergence_plain) / 4)
    (drawing,) = [d for d in section.figures if d.name == "softening"]
    lines = [line for line in drawing.figure.axes[0].lines if len(line.get_xdata()) == 2]
    ends = [(line.get_xdata()[1], *line.get_ydata()) for line in lines]
    expected = [end for g in report.groups for end in zip(g.softening_ratio, g.divergence_plain, g.divergence_after)]
    assert ends == [pytest.approx((ratio, max(plain, 1e-6), max(fit, 1e-6))) for ratio, plain, fit in expected]
    assert save_figure(drawing.figure, tmp_path / "dial")
    plain = convert(gpt2(), AttentionSpec("l2"), init="plain").conversion_report
    assert [d.name for d in conversion_section(plain.to_dict()).figures] == ["parameters"]


def test_figures_draw_large_and_odd_input(tmp_path):
    """Twelve by twelve heads, long token lists, formulas in tokens, NaN, a single token: drawn, within bounds."""
    generator = np.random.default_rng(0)
    tokens = ["$x_1$", "verylongtokenthatgoeson", "<s>"] * 100
    weights = generator.dirichlet(np.ones(300), size=300)
    grid = generator.normal(size=(12, 12))
    grid[3, 4:] = np.nan
    modules = [f"h.{i}.attn" for i in range(12)]
    drawn = [
        draw.attention_map(weights, tokens, title="$"),
        draw.maps_beside(weights, weights, tokens, "$a"),
        draw.head_maps({name: weights[None, :20, :20].repeat(12, 0) for name in modules}),
        draw.number_grid(grid, modules, "x", diverging=True),
        draw.number_grid(np.full((1, 1), np.nan), modules[:1], "x"),
        draw.attention_map([[1.0]], ["a"]),
        draw.token_bars([0.0], ["a"], "x"),
    ]
    for place, figure in enumerate(drawn):
        width, height = figure.get_size_inches()
        assert width <= 13
        assert height <= 13
        for path in save_figure(figure, tmp_path / str(place)):
            assert path.stat().st_size > 1000
        svg = inline_svg(figure, '"label" <b>')
        assert svg.startswith('<svg role="img" aria-label="&quot;label&quot; &lt;b&gt;"')
        assert "currentColor" in svg
        assert "http" not in svg
    labels = [t.get_text() for t in drawn[0].axes[0].get_xticklabels()]
    assert len(labels) <= 64, "labels are thinned out"
    assert max(map(len, labels)) <= 14


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: draw.attention_map(np.ones((2, 3)), ["a", "b"]), r"\(queries, keys\) = \(2, 2\), got \(2, 3\)"),
        (lambda: draw.head_maps({}), "maps is empty"),
        (lambda: draw.token_bars([1.0], ["a", "b"], "x"), r"one a token \(2\), got shape \(1,\)"),
        (lambda: draw.head_parameters([{"module": "a"}]), "neither λ nor α"),
    ],
)
def test_figures_say_what_they_take(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_short_names_tell_modules_apart():
    assert draw.short_names(["h.0.attn", "h.11.attn"]) == ["0", "11"]
    assert draw.short_names(["attn"]) == ["attn"]
    t5 = list(dict.fromkeys(h.module for h in measure(FAMILIES["t5"](), [token_batch(FAMILIES["t5"]())]).heads))
    assert draw.short_names(t5) == ["enc 0", "enc 1", "dec 0", "dec 0 cross", "dec 1", "dec 1 cross"]
    assert draw.short_names(["a.0.x", "b.0.x"]) == ["a.0.x", "b.0.x"]


def test_rank_correlation():
    from distattn_hf.analysis.importance import HeadImportance

    rows = [HeadImportance("gradient", 0.0, {"a": scores}) for scores in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0])]
    assert rank_correlation(rows[0], rows[0]) == 1.0
    assert rank_correlation(*rows) == -1.0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_cut_off_in_a_browser(width, written, tmp_path):
    """The page in a frame of that width (a window is never narrower than 500): what overflows can be scrolled to."""
    page = (written[0] / "report.html").as_uri()
    script = """
      const root = frame.contentDocument, inside = root.documentElement, edge = frame.contentWindow.innerWidth;
      const out = [...root.querySelectorAll('main *')].filter(
        e => !e.closest('.wide') && e.getBoundingClientRect().right > edge + 0.5);
      const boxes = [...root.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth);
      const stuck = boxes.filter(e => getComputedStyle(e).overflowX !== 'auto');
      const flat = [...root.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 40);
      const over = Math.max(0, inside.scrollWidth - edge);
      document.body.dataset.found = [edge, over, out.length, stuck.length, flat.length].join();
    """
    frame = f'<iframe id="frame" src="{page}" style="border:0;width:{width}px;height:900px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<body>{frame}<script>frame.onload = () => {{{script}}}</script></body>")
    result = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000",
            "--dump-dom", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr, result.stderr
    found = re.search(r'data-found="([^"]*)"', result.stdout)
    assert found, "the page did not load"
    assert found[1] == f"{width},0,0,0,0"


def test_a_teacher_that_cannot_read_the_text_is_refused():
    from distattn_hf import load_checkpoint

    model, tokenizer = load_checkpoint(GPT2_ENGLISH)
    with pytest.raises(ValueError, match="GPT2LMHeadModel embeds 64: not its tokenizer"):
        analyse_models(model, tokenizer, ["In the beginning"], teacher=gpt2(), options=OPTIONS)
