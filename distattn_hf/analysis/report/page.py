"""One HTML page that explains an analysis: self-contained, for dark and light, phone and desktop."""

import html
from statistics import fmean

from ..figure_style import inline_svg
from .compared import comparison_section, conversion_section, scorecard_section
from .heads import importance_section, patterns_section, statistics_section, table_section
from .parts import Example, Section, number, plural
from .text import maps_section, tokens_section

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --panel: #1d2125; --ink: #e6e8ea; --soft: #a3abb3;
  --line: #3a4149; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0; }
h2 { font-size: 1.25rem; margin: 48px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
p { max-width: 72ch; margin: 8px 0; }
nav ul { padding-left: 20px; columns: 2 220px; }
a { color: var(--accent); }
figure { margin: 20px 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 8px; }
.wide { overflow-x: auto; max-width: 100%; }
.wide:focus-visible { outline: 2px solid var(--accent); }
.wide svg { display: block; color: var(--ink); }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.tall { max-height: 480px; overflow-y: auto; }
.tall th { position: sticky; top: 0; background: var(--ground); }
.note { color: var(--soft); }
.narrow { display: none; }
@media (max-width: 700px) { .narrow { display: block; } }
"""
_TALL = 16
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
    name, teacher = html.escape(analysis.model), html.escape(analysis.teacher or "")
    against = f", beside its teacher {teacher}" if teacher else ""
    numbered = list(enumerate(sections, 1))
    contents = "".join(f'<li><a href="#part{i}">{html.escape(s.title)}</a></li>' for i, s in numbered)
    versions = ", ".join(f"{key} {value}" for key, value in analysis.versions.items())
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in analysis.notes)
    body = "".join(_section(i, section) for i, section in numbered)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without it a browser asks the folder for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>Attention of {name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Attention of {name}</h1>\n<p>{html.escape(analysis.architecture)}{against}.</p>\n"
        f"<p><strong>{html.escape(verdict(analysis))}</strong></p>\n{notes}"
        '<p class="note narrow">Wide figures and tables scroll sideways.</p>'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{body}'
        f'<p class="note">Made by distattn analyse; {html.escape(versions)}.</p>\n</main>\n</body>\n</html>\n'
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


def _section(position: int, section: Section) -> str:
    parts = [f'<section id="part{position}">\n<h2>{html.escape(section.title)}</h2>\n']
    parts += [f"<p>{html.escape(text)}</p>\n" for text in section.words]
    if section.table:
        parts.append(_table(section))
    for drawing in section.figures:
        caption = html.escape(drawing.caption)
        # A box that scrolls must be reachable by keyboard.
        parts.append(
            f'<figure><div class="wide" tabindex="0">{inline_svg(drawing.figure, drawing.caption)}</div>'
            f"<figcaption>{caption}</figcaption></figure>\n"
        )
    return "".join([*parts, "</section>\n"])


def _table(section: Section) -> str:
    header, *rows = section.table
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    label = html.escape(section.title, quote=True)
    kind = "wide tall" if len(rows) > _TALL else "wide"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )
