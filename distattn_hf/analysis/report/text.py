"""The report's sections on the first text: its attention maps, and the importance of its tokens."""

import numpy as np

from . import figures as draw
from .parts import Drawing, Example, Section, listed, number, place, plural


def maps_section(example: Example) -> Section:
    """Build the section of maps: all heads small, some of them large, beside those of the teacher."""
    modules = list(example.maps)
    names = dict(zip(modules, draw.short_names(modules)))
    text = " ".join(example.tokens["encoder"])
    count = len(example.tokens["encoder"])
    words = [
        f"The first text, cut to {plural(count, 'token')}: “{text}”. A row is a query, a column a key; yellow is most."
    ]
    grid = draw.head_maps({name: entry["weights"] for name, entry in example.maps.items()})
    drawings = [Drawing("maps", grid, "Every head's map of this text, each on a scale of its own.")]
    if example.teacher_maps:
        teacher = {name: entry["weights"] for name, entry in example.teacher_maps.items()}
        drawings.append(Drawing("maps_teacher", draw.head_maps(teacher), "The same of the teacher."))
    for module, heads in example.shown.items():
        if module in example.maps:
            drawings += [_large(example, names, module, head) for head in heads]
    return Section("Maps of one text", words, drawings)


def _large(example: Example, names: dict, module: str, head: int) -> Drawing:
    weights = np.asarray(example.maps[module]["weights"][head])
    queries, keys = example.tokens_of(module)
    query, key = np.unravel_index(int(weights[1:].argmax()), weights[1:].shape) if len(weights) > 1 else (-1, 0)
    title = place(names, module, head)
    stem = f"map_{names[module].replace(' ', '_')}_{head}"
    caption = (
        f"{title[:1].upper()}{title[1:]}: after the first row the largest weight is {number(weights[query + 1, key])}, "
        f"from “{queries[query + 1]}” to “{keys[key]}”."
    )
    teacher = example.teacher_maps.get(module)
    if teacher is None:
        return Drawing(stem, draw.attention_map(weights, queries, keys, title), caption)
    other = np.asarray(teacher["weights"][head])
    caption += f" The largest difference from the teacher's weights is {number(float(np.abs(weights - other).max()))}."
    return Drawing(stem, draw.maps_beside(other, weights, queries, title, keys), caption)


def tokens_section(analysis, example: Example) -> Section:
    """Build the section on rollout and gradient attribution of the first text."""
    tokens = example.tokens["encoder"]
    section = Section("Which tokens count")
    if analysis.rollout is not None and len(analysis.rollout) == len(tokens):
        furthest = sorted(range(len(tokens)), key=lambda i: -analysis.rollout[i])[:3]
        token_list = listed([f"“{tokens[i]}” ({analysis.rollout[i]:.1%})" for i in furthest])
        section.words.append(
            "Attention rollout (Abnar and Zuidema, 2020: heads averaged, half of each layer skips the attention) says "
            f"how much of each token reaches the end, by attention alone. Most does of {token_list}."
        )
        figure = draw.attention_map(example.rollout, tokens, tokens, "rollout through all layers")
        section.figures.append(
            Drawing("rollout", figure, "Rollout: what each position (row) holds of each token (column).")
        )
    if analysis.attribution is not None:
        values = analysis.attribution
        largest = sorted(range(len(tokens)), key=lambda i: -abs(values[i]))[:3]
        token_list = listed([f"“{tokens[i]}” ({number(values[i])})" for i in largest])
        section.words.append(
            "Gradient × input says how much each token's embedding bears on the model's answer. Most does that of "
            f"{token_list}."
        )
        figure = draw.token_bars(values, tokens, "gradient × input")
        section.figures.append(Drawing("attribution", figure, "Attribution of each token, signed."))
    return section
