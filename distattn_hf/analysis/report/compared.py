"""The report's sections on the whole checkpoint: its conversion, its scorecard, and the comparison with its teacher."""

import math
from statistics import fmean

from ...conversion.report import ConversionReport
from ..comparison import NUM_BUCKETS, Comparison
from . import figures as draw
from .parts import Drawing, Section, listed, number, place, plural

# Labels of colour scales, with the best value.
_KL_SCALE = "KL (nats per query; 0 is equal)"
_CORRELATION_SCALE = "correlation (1 is equal, 0 unrelated)"


def conversion_section(report: dict) -> Section:
    """Build the section on the conversion from `ConversionReport.to_dict`."""
    report = ConversionReport.from_dict(report)
    words = [report.summary() + "."]
    if (alpha := report.mean_alpha) is not None:
        tendency = "nearer to the teacher's dot product" if alpha < 0.5 else "more Euclidean than not"
        words.append(
            "α says how Euclidean a head is: 1 leaves the distance as it is, towards 0 it becomes the teacher. The "
            f"mean is {number(alpha)}: {tendency}."
        )
    if ratios := report.softening_ratios:
        words.append(
            "ε says below which distance a head's logits are quadratic, as the teacher's are but for norms: 0 is the "
            "plain distance. In medians of the head's distances it was fitted as "
            f"{number(min(ratios))} to {number(max(ratios))}."
        )
    if report.mean_divergence_after is not None:
        words.append("KL is that of the attention weights from the teacher's, in nats per query: 0 is equal.")
    words += [f"Warning: {text}" for text in report.warnings]
    section = Section("The conversion", words)
    groups = report.to_dict()["groups"]
    section.table = [["module", "attention", "heads", "mean λ", "mean α", "KL before", "KL after"]]
    if ratios:
        section.table[0] += ["mean ε/median", "KL plain"]
    for group in report.groups:
        means = [group.lam, group.alpha, group.divergence_before, group.divergence_after]
        means += [group.softening_ratio, group.divergence_plain] if ratios else []
        cells = ["–" if not v else number(fmean(v)) for v in means]
        section.table.append([group.module, group.attention, str(len(group.heads)), *cells])
    if any(group["lam"] for group in groups):
        lam = [v for group in report.groups for v in group.lam]
        caption = f"λ of {plural(len(lam), 'head')} runs from {number(min(lam))} to {number(max(lam))}"
        alphas = [v for group in report.groups for v in group.alpha or ()]
        if alphas:
            caption += f", α from {number(min(alphas))} to {number(max(alphas))}"
        section.figures.append(Drawing("parameters", draw.head_parameters(groups), f"{caption}; a point a head."))
    if ratios:
        caption = "The dial: a line a head, from its plain distance (orange, left) to what was fitted (blue)."
        section.figures.append(Drawing("softening", draw.softening_dial(groups), caption))
    return section


def scorecard_section(card: dict) -> Section:
    """Build the section on the scores from `Scorecard.to_dict`."""
    direction = "higher" if card["greater_is_better"] else "lower"
    words = [f"{card['metric']} on {card['data'].get('eval')} ({direction} is better), teacher {card['teacher']}."]
    teacher = next((entry for entry in card["rows"] if entry["name"] == card["ratio_to"]), None)
    checkpoint = next((entry for entry in card["rows"] if entry["name"] == card.get("checkpoint")), None)
    if teacher and checkpoint:
        words.append(
            f"This checkpoint ({checkpoint['name']}) scores {number(checkpoint['score'])}, the {card['ratio_to']} "
            f"{number(teacher['score'])}: {number(checkpoint['score'] / teacher['score'])} times as much."
        )
    table = [["model", card["metric"], f"to {card['ratio_to']}", "parameters trained", "tokens", "seconds"]]
    for row in card["rows"]:
        cost = [row[name] for name in ("trained_parameters", "tokens", "seconds")]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.4f}"
        table.append([row["name"], f"{row['score']:.4f}", ratio, *("–" if v is None else f"{v:,.0f}" for v in cost)])
    return Section("The scorecard", words, table=table)


def comparison_section(comparison: Comparison) -> Section:
    """Build the section that compares student and teacher."""
    names = dict(zip(comparison.modules, draw.short_names(comparison.modules)))
    heads = sorted(comparison.heads, key=lambda h: -h.divergence)
    mean, correlation = fmean(h.divergence for h in heads), fmean(h.correlation for h in heads)
    worst = listed([f"{place(names, h.module, h.head)} ({number(h.divergence)})" for h in heads[:3]])
    cosine = comparison.output_cosine
    worst_module = min(cosine, key=cosine.get)
    words = [
        f"Both models read the same text, each on its own hidden states. The student's weights have a KL of "
        f"{number(mean)} nats per query from the teacher's in the mean over {plural(len(heads), 'head')}, and "
        f"correlate with them at {number(correlation)}. Furthest off: {worst}.",
        f"The attention outputs have a cosine with the teacher's of {number(fmean(cosine.values()))} in the mean and "
        f"{number(cosine[worst_module])} in module {names[worst_module]}, the lowest.",
    ]
    parts = [[row[i] for row in comparison.by_position.values() if row[i] is not None] for i in range(NUM_BUCKETS)]
    means = [fmean(part_values) if part_values else math.nan for part_values in parts]
    measured = [i for i, value in enumerate(means) if math.isfinite(value)]
    if measured:
        highest, lowest = (choose(measured, key=lambda i: means[i]) for choose in (max, min))
        words.append(
            f"Along the text, KL is largest in part {highest + 1} of {len(means)} ({number(means[highest])} "
            f"nats) and smallest in part {lowest + 1} ({number(means[lowest])})."
        )
    if errors := [h.output_error for h in heads if h.output_error is not None]:
        weak = [h.weak_rows for h in heads if h.weak_rows is not None]
        words.append(
            f"Nyström attention: outputs are {fmean(errors):.1%} off the kernel that it approximates"
            + (
                f", and {fmean(weak):.1%} of the rows are weak (softmax denominator off by more than 25%)."
                if weak
                else "."
            )
        )
    modules = comparison.modules
    drawings = [
        Drawing(
            "divergence", draw.number_grid(comparison.grid("divergence"), modules, _KL_SCALE),
            f"KL(teacher ‖ student) in nats per query, 0 where both are equal: from {number(heads[-1].divergence)} to "
            f"{number(heads[0].divergence)}.",
        ),
        Drawing(
            "correlation", draw.number_grid(comparison.grid("correlation"), modules, _CORRELATION_SCALE),
            f"Correlation of the rows of weights; the mean is {number(correlation)}. 1 is the teacher's row up to "
            "scale, 0 is unrelated to it.",
        ),
        Drawing(
            "output_cosine", draw.curve({"cosine": list(cosine.values())}, modules, "cosine of outputs"),
            f"Cosine of the attention outputs with the teacher's, module by module; lowest in {names[worst_module]}.",
        ),
        Drawing(
            "by_position",
            draw.number_grid(
                [[math.nan if v is None else v for v in row] for row in comparison.by_position.values()], modules,
                _KL_SCALE, column="part of the text",
            ),
            "Where in the text the weights differ: mean KL over heads in eight equal parts, first to last.",
        ),
    ]  # fmt: skip
    if errors:
        figure = draw.number_grid(comparison.grid("output_error"), modules, "relative error (0 is none)")
        drawings.append(
            Drawing(
                "nystrom_error",
                figure,
                f"Nyström: relative error of outputs, 0 where there is none; mean {fmean(errors):.1%}.",
            )
        )
    return Section("Teacher and student", words, drawings)
