"""One HTML page that explains an analysis: self-contained, for dark and light, phone and desktop."""

from importlib.resources import files
from statistics import fmean

import jinja2

from ..figure_style import inline_svg
from .compared import comparison_section, conversion_section, scorecard_section
from .heads import importance_section, patterns_section, statistics_section, table_section
from .parts import Example, Section, number, plural
from .text import maps_section, tokens_section

# A table with more rows, its header among them, scrolls in a box.
_MOST_ROWS = 17
# Least mean cosine of the attention outputs with the teacher's -> what the verdict calls it.
_CLOSENESS = ((0.99, "almost equal to"), (0.95, "close to"), (0.8, "clearly different from"))
_FAR = "far from"


def build_sections(analysis, example: Example | None = None) -> list[Section]:
    """All sections of an `Analysis` in the report's order; without an example no maps."""
    found = []
    if analysis.conversion:
        found.append(conversion_section(analysis.conversion))
    if analysis.scorecard:
        found.append(scorecard_section(analysis.scorecard))
    if analysis.comparison:
        found.append(comparison_section(analysis.comparison))
    found.append(statistics_section(analysis.statistics, analysis.teacher_statistics))
    found.append(patterns_section(analysis.statistics, analysis.teacher_statistics))
    if analysis.importance:
        found.append(importance_section(analysis.importance))
    if example is not None:
        found += [maps_section(example), tokens_section(analysis, example)]
    found.append(table_section(analysis.statistics))
    return found


def render(analysis, sections: list[Section]) -> str:
    """The page. Whatever comes from a model, a text or a user is escaped; nothing is loaded from elsewhere."""
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
    """What the analysis comes to, in one sentence with its numbers."""
    card, parts = analysis.scorecard, []
    own = next((r for r in card["rows"] if r["name"] == card.get("checkpoint")), None) if card else None
    if own and own["ratio"] is not None:
        better = "more is better" if card["greater_is_better"] else "less is better"
        parts.append(
            f"{card['metric']} on {card['data'].get('eval')} is {own['ratio']:.3f} times the {card['ratio_to']}'s "
            f"({better})"
        )
    if analysis.comparison:
        heads, cosine = analysis.comparison.heads, fmean(analysis.comparison.output_cosine.values())
        word = next((word for least, word in _CLOSENESS if cosine >= least), _FAR)
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
