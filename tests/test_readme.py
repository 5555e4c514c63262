"""The README, the guides and the cards are true: their figures, links, commands and code."""

import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from distattn_hf.cli import app
from tests.fixtures.load import GPT2_ENGLISH

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "model_cards").glob("**/*.md")))]
VERBS = typer.main.get_command(app).commands
SVG = "{http://www.w3.org/2000/svg}"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page: str) -> list[str]:
    """Return the lines of a page's shell blocks, joined where they end in a backslash."""
    return [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]


def test_cards_and_the_readmes_table_are_what_the_results_say():
    run = subprocess.run(
        [sys.executable, "scripts/render_cards.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, f"python scripts/render_cards.py would change: {run.stdout} {run.stderr}"


def test_the_picture_says_what_the_table_says():
    """Each figure that is drawn, at the place that its axis says, is in the table's cell. Breaks if an axis is off."""
    drawn = ElementTree.parse(ROOT / "model_cards" / "results" / "choices.svg").getroot()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = [line for line in text.partition("<!-- choices")[2].splitlines() if line.startswith("| `")]
    words = [(word.text, float(word.get("x")), float(word.get("y"))) for word in drawn.iter(f"{SVG}text")]
    middle = [word for word in drawn.iter(f"{SVG}text") if word.get("text-anchor") == "middle"]
    ticks = [(float(word.text), float(word.get("x"))) for word in middle]
    # The two axes: numbers from left to right, until they begin anew.
    cut = next(i for i, (before, after) in enumerate(zip(ticks, ticks[1:]), 1) if after[0] < before[0])
    axes = [(math.log(a[0]), a[1], math.log(b[0]), b[1]) for a, *_, b in (ticks[:cut], ticks[cut:])]
    names = [(t, y - 4) for t, _, y in words if any(f'"{t}' in line for line in table)]
    metrics = ["sqeuclidean", "l2", "cosine", "l1", "lp", "chebyshev"]
    assert [name for name, _ in names] == [*metrics, "retrieval", "nystrom"]
    found = 0
    for name, height in names:
        (row,) = (line for line in table if f'"{name}"' in line)
        for circle in drawn.iter(f"{SVG}circle"):
            if float(circle.get("cy")) == height:
                x = float(circle.get("cx"))
                is_time = x > axes[1][1] - 20
                low, left, high, right = axes[is_time]
                value = math.exp(low + (x - left) / (right - left) * (high - low))
                figures = [float(figure) for figure in re.findall(r"\d+\.\d+", row.split("|")[4 + is_time])]
                assert min(abs(value / figure - 1) for figure in figures) < 0.01, (name, value, figures)
                found += 1
    assert found >= 16


def test_a_run_on_a_gpu_fills_the_cards_section():
    """With the report of the interpreter in its place: its file has the same form."""
    names = runpy.run_path(str(ROOT / "scripts" / "render_cards.py"))
    card, found = names["CARDS"] / "speed.md", names["results"]("gpu_check_interpreter")
    assert "**Not run yet.**" in names["rendered"]()[card]
    found["rows"]["exact"][0]["target"] = 0.25
    names["rendered"].__globals__["results_if_any"] = {"gpu_check": found}.get
    text = names["rendered"]()[card].partition("## On a GPU")[2]
    assert "Not run yet" not in text
    assert found["provenance"]["device"] in text
    (line,) = (line for line in text.splitlines() if line.startswith("| exact sqeuclidean forward 64 |"))
    assert line.endswith(" 0.25 |")
    assert f"{1e3 * found['rows']['exact'][0]['ours']['median']:.3f}" in line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_they_are_shown_with(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["distattn"]:
            # Raises for an option or an argument that the verb does not have; runs nothing.
            VERBS[words[1]].make_context(words[1], words[2:])
        for word in words:
            if word.startswith(("configs/", "scripts/")):
                assert (ROOT / word).exists(), line


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_named_can_be_imported(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in re.findall(r"python -m (distattn_hf[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for block in blocks(page, "python"):
        compile(block, page, "exec")
        for line in re.findall(r"^from distattn_hf[\w.]* import (?:\([^)]*\)|.*)", block, re.M):
            exec(line)


def test_the_readmes_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a self-trained GPT-2 in the place of the Hub's model and fits of few steps, which is all that is changed."""
    code = "\n".join(blocks("README.md", "python"))
    for shown, run in (
        (HUB_NAME, str(GPT2_ENGLISH)),
        ("tokenizer=tok)", "tokenizer=tok, options=distattn_hf.CalibrationOptions(steps=4))"),
        ("max_error=0.4)", "max_error=0.4, steps=4)"),
    ):
        assert code.count(shown) == 1
        code = code.replace(shown, run)
    monkeypatch.chdir(tmp_path)
    heldout = (GPT2_ENGLISH / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "some_text.txt").write_text(heldout.replace("\n", "\n\n"), encoding="utf-8")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    # What the blocks say of themselves: saved and loaded, true weights, the teacher as it was.
    for mine, before in zip(names["teacher_again"].parameters(), names["teacher"].parameters(), strict=True):
        assert mine.equal(before)
    assert all((weights.sum(-1) - 1).abs().max() < 1e-5 for weights in names["weights"])
    assert type(names["model"]).__name__ == "DistAttnGPT2LMHeadModel"
    assert names["found"].config.distattn["specs"][0]["min_weight"] == 0.001
