"""Render an analysis as one self-contained HTML page, for dark and light mode, phone and desktop."""

from importlib.resources import files
from statistics import fmean

import jinja2

from ..figure_style import inline_svg
from .compared import comparison_section, conversion_section, scorecard_section
from .heads import importance_section, patterns_section, statistics_section, table_section
from .parts import Example, Section, number, plural
from .text import maps_section, tokens_section

# A table with more rows, including the header, scrolls in a box.
_MOST_ROWS = 17
# Least mean cosine of the attention outputs with the teacher's -> wording of the verdict.
_CLOSENESS = ((0.99, "almost equal to"), (0.95, "close to"), (0.8, "clearly different from"))
_FAR = "far from"


def build_sections(analysis, example: Example | None = None) -> list[Section]:
    """Build all sections of an `Analysis` in the report's order; without an example no maps."""
    sections = []
    if analysis.conversion:
        sections.append(conversion_section(analysis.conversion))
    if analysis.scorecard:
        sections.append(scorecard_section(analysis.scorecard))
    if analysis.comparison:
        sections.append(comparison_section(analysis.comparison))
    sections.append(statistics_section(analysis.statistics, analysis.teacher_statistics))
    sections.append(patterns_section(analysis.statistics, analysis.teacher_statistics))
    if analysis.importance:
        sections.append(importance_section(analysis.importance))
    if example is not None:
        sections += [maps_section(example), tokens_section(analysis, example)]
    sections.append(table_section(analysis.statistics))
    return sections


def render(analysis, sections: list[Section]) -> str:
    """Render the page. All text from models, data and users is escaped; the page loads no external resources."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        analysis=analysis, sections=sections, verdict=verdict(analysis), most_rows=_MOST_ROWS, inline_svg=inline_svg
    )


def verdict(analysis) -> str:
    """Summarise the analysis in one sentence with its numbers."""
    card, parts = analysis.scorecard, []
    row = next((r for r in card["rows"] if r["name"] == card.get("checkpoint")), None) if card else None
    if row and row["ratio"] is not None:
        direction = "more is better" if card["greater_is_better"] else "less is better"
        parts.append(
            f"{card['metric']} on {card['data'].get('eval')} is {row['ratio']:.3f} times the {card['ratio_to']}'s "
            f"({direction})"
        )
    if analysis.comparison:
        heads, cosine = analysis.comparison.heads, fmean(analysis.comparison.output_cosine.values())
        word = next((word for threshold, word in _CLOSENESS if cosine >= threshold), _FAR)
        parts.append(
            f"the attention outputs are {word} the teacher's (cosine {number(cosine)} in the mean, 1 is equal; KL of "
            f"the weights {number(fmean(h.divergence for h in heads))} nats per query, 0 is equal)"
        )
    if not parts:
        heads = analysis.statistics.heads
        collapsed = sum(h.collapsed for h in heads)
        count, pattern = max((n, name) for name, n in analysis.statistics.pattern_counts().items())
        parts.append(
            f"of {plural(len(heads), 'head')} {collapsed} {'has' if collapsed == 1 else 'have'} collapsed, and the "
            f"most frequent pattern is {pattern} ({count}); there is no teacher beside it to say what that is worth"
        )
    return f"Verdict: {'; '.join(parts)}."
