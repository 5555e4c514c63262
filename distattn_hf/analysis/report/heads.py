"""The report's sections on single heads: statistics, patterns, importance, and the table of all heads."""

import math
from statistics import fmean

from ..head_patterns import MIXED, NAMED_FROM
from ..importance import HeadImportance
from ..statistics import AttentionStatistics
from . import figures as draw
from .parts import Drawing, Section, listed, number, place, plural


def statistics_section(statistics: AttentionStatistics, teacher: AttentionStatistics | None) -> Section:
    """Build the section on entropy, distance, collapse, diversity and the share of the keys' norms."""
    names = dict(zip(statistics.modules, draw.short_names(statistics.modules)))
    heads = [h for h in statistics.heads if h.rows]
    narrow, wide = (choose(heads, key=lambda h: h.entropy) for choose in (min, max))
    curve = [fmean(h.entropy for h in statistics.of(m)) for m in statistics.modules]
    words = [
        f"Over {plural(statistics.num_texts, 'text')} of {plural(statistics.num_tokens, 'token')}, padding left out. "
        f"The narrowest head is {place(names, narrow.module, narrow.head)} (entropy {number(narrow.entropy)} nats, "
        f"largest weight {number(narrow.maximum)} in the mean), the widest {place(names, wide.module, wide.head)} "
        f"({number(wide.entropy)} nats, as if over {number(math.exp(wide.entropy))} keys).",
        f"The mean entropy is {number(curve[0])} nats in the first module and {number(curve[-1])} in the last.",
    ]
    collapsed = [h for h in heads if h.collapsed]
    if collapsed:
        single = len(collapsed) == 1
        words.append(
            f"{plural(len(collapsed), 'head')} {'has' if single else 'have'} collapsed (mean entropy below 0.1 or mean "
            f"largest weight above 0.95): {listed([place(names, h.module, h.head) for h in collapsed])}. A head may "
            "collapse on purpose, such as one that always looks at the previous token."
        )
    else:
        words.append("No head has collapsed (mean entropy below 0.1 or mean largest weight above 0.95).")
    alike = min(statistics.modules, key=lambda m: fmean(h.diversity for h in statistics.of(m)))
    words.append(
        f"Heads are most alike in module {names[alike]}: {number(fmean(h.diversity for h in statistics.of(alike)))} "
        f"nats from their mean row, where {number(math.log(max(len(statistics.of(alike)), 1)))} would be as different "
        "as can be."
    )
    section = Section("What the heads look like", words)
    caption = "Mean over heads, module by module; the shaded range is that of the heads."
    if teacher is not None:
        means = [fmean(h.entropy for h in s.heads) for s in (statistics, teacher)]
        caption += f" Dashed: the teacher. Mean entropy {number(means[0])} nats, the teacher's {number(means[1])}."
        teacher = teacher if len(teacher.modules) == len(statistics.modules) else None
    section.figures.append(Drawing("curves", draw.layer_curves(statistics, teacher), caption))
    figure = draw.number_grid(statistics.grid("entropy"), statistics.modules, "entropy (nats)")
    section.figures.append(
        Drawing("entropy", figure, f"Entropy of every head: {number(narrow.entropy)} to {number(wide.entropy)} nats.")
    )
    figure = draw.number_grid(statistics.grid("distance"), statistics.modules, "distance (tokens)")
    far = max(heads, key=lambda h: h.distance)
    text = f"How far heads look, in tokens; furthest {place(names, far.module, far.head)} with {number(far.distance)}."
    section.figures.append(Drawing("distance", figure, text))
    shares = [h for h in heads if h.key_norm_share is not None]
    if shares:
        mean, top = fmean(h.key_norm_share for h in shares), max(shares, key=lambda h: h.key_norm_share)
        section.words.append(
            "The part of the logits that the keys' norms alone make, which a dot product does not have, has "
            f"{number(mean)} times the variance of the whole in the mean, and {number(top.key_norm_share)} times in "
            f"{place(names, top.module, top.head)}. Near 0 the distance acts as a dot product."
        )
        figure = draw.number_grid(statistics.grid("key_norm_share"), statistics.modules, "variance ratio")
        text = "Variance of the key-norm term over that of the logits; above 1 the dot product works against it."
        section.figures.append(Drawing("key_norm_share", figure, text))
    return section


def patterns_section(statistics: AttentionStatistics, teacher: AttentionStatistics | None) -> Section:
    """Build the section on the pattern of each head."""
    names = dict(zip(statistics.modules, draw.short_names(statistics.modules)))
    counts = statistics.pattern_counts()
    named = {name: count for name, count in counts.items() if name != MIXED}
    total = len(statistics.heads)
    words = [
        f"{sum(named.values())} of {plural(total, 'head')} have a pattern with a name"
        + (f": {listed([f'{count} {name}' for name, count in named.items()], 9)}." if named else ".")
    ]
    strongest = []
    for name in named:
        head = max((h for h in statistics.heads if h.pattern == name), key=lambda h: h.strength)
        strongest.append(f"{name} in {place(names, head.module, head.head)} ({number(head.strength)})")
    if strongest:
        words.append(f"The strongest of each: {listed(strongest, 9)}.")
    words.append(
        "Strength 0 is what a uniform head would give to the same keys, 1 all weight; a name needs "
        f"{NAMED_FROM['previous token']}, “uniform” {NAMED_FROM['uniform']} of the keys in use."
    )
    if teacher is not None:
        own_patterns = {(h.module, h.head): h.pattern for h in statistics.heads}
        num_same = sum(own_patterns.get((h.module, h.head)) == h.pattern for h in teacher.heads)
        words.append(f"{num_same} of {plural(total, 'head')} have the teacher's pattern.")
    caption = "The dominant pattern of every head by letter and colour; the stronger, the more solid."
    return Section("Patterns", words, [Drawing("patterns", draw.pattern_grid(statistics), caption)])


def importance_section(importance: dict[str, HeadImportance]) -> Section:
    """Build the section on the importance of heads to the loss, by each kind of measurement."""
    modules = list(next(iter(importance.values())).scores)
    names = dict(zip(modules, draw.short_names(modules)))
    section = Section("Which heads matter")
    descriptions = {
        "gradient": "By gradient (Michel et al., 2019: how the loss changes with a factor on a head's output)",
        "ablation": "By ablation (how much the loss grows when the head gives zeros)",
    }
    for kind, scores in importance.items():
        ranked = scores.ranking()
        top = listed([f"{place(names, module, head)} ({number(score)})" for module, head, score in ranked[:3]])
        words = f"{descriptions[kind]}, at a loss of {number(scores.loss)} nats, the first are {top}."
        if kind == "ablation":
            count = sum(score < 0 for *_, score in ranked)
            words += f" Without {plural(count, 'head')} of {len(ranked)} the loss would be lower." if count else ""
        section.words.append(words)
        figure = draw.number_grid(scores.grid(), modules, "nats", diverging=kind == "ablation")
        caption = (
            f"Importance by {kind}; the largest is {place(names, *ranked[0][:2])} with {number(ranked[0][2])} nats."
        )
        section.figures.append(Drawing(f"importance_{kind}", figure, caption))
    if len(importance) == 2:
        section.words.append(
            f"The two rankings agree at a rank correlation of {number(rank_correlation(*importance.values()))} (1: "
            "the same)."
        )
    return section


def rank_correlation(left: HeadImportance, right: HeadImportance) -> float:
    """Return Spearman's rank correlation over all heads, without ties; 0 for fewer than two heads."""
    orders = [{item[:2]: i for i, item in enumerate(importance.ranking())} for importance in (left, right)]
    count = len(orders[0])
    if count < 2:
        return 0.0
    squared = sum((orders[0][key] - orders[1][key]) ** 2 for key in orders[0])
    return 1 - 6 * squared / (count * (count**2 - 1))


def table_section(statistics: AttentionStatistics) -> Section:
    """Build the table with one row per head."""
    header = "module head pattern strength entropy sparsity largest distance diversity collapsed"
    table = [header.split()]
    for head in statistics.heads:
        cells = (head.strength, head.entropy, head.sparsity, head.maximum, head.distance, head.diversity)
        collapsed = "yes" if head.collapsed else f"{head.collapsed_rows:.1%} of rows"
        table.append([head.module, str(head.head), head.pattern, *map(number, cells), collapsed])
    words = [
        "Entropy and diversity in nats, distance in tokens; sparsity is Hoyer's, 0 uniform and 1 a single key. All "
        "means are over the queries that are no padding and see at least two keys. heads.csv holds the same numbers "
        "in full."
    ]
    return Section("All heads", words, table=table)
