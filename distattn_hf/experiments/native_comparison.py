"""`compare`: train from scratch with several choices in the config, several seeds each; write a table and a figure."""

import json
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..analysis.figure_style import COLOURS, new_figure, save_figure, styled
from ..benchmark.results import provenance
from ..data.config import override, read_mapping, refuse_unknown
from ..data.tasks import TASKS
from ..storage.folders import write_atomically, write_json
from ..training.arguments_scratch import ScratchConfig, parse_scratch_config, read_scratch_config
from ..training.from_scratch import train_from_scratch

RESULTS, TABLE, FIGURE = "comparison.json", "comparison.md", "comparison"


@dataclass
class Comparison:
    """The runs to compare, {choice: [config of each seed]}, and the folder of the results."""

    runs: dict[str, list[ScratchConfig]]
    output_dir: Path


def read_comparison(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Comparison:
    """Read a comparison from a YAML file: {base, set, choices: {name: {set, seeds}}, seeds, output_dir}.

    base: a config of `distattn train`; set: overrides of it for all runs, then for one choice ("model.mechanism: l1").
    Overrides given here (key=value) are for all runs. Every config is checked before the first run.

    Raises `ValueError` naming the key, its value and what is allowed.
    """
    values = read_mapping(path, "config")
    refuse_unknown(values, ["base", "set", "choices", "seeds", "output_dir"])
    for name, kind in (("base", str), ("choices", dict), ("output_dir", str)):
        if not isinstance(values.get(name), kind) or not values[name]:
            raise ValueError(f"{name} must be a {'mapping' if kind is dict else 'path'}, got {values.get(name)!r}")
    output_dir, runs = values["output_dir"], {}
    _check_settings("set", values.get("set"))
    for text in [t for t in overrides if t.partition("=")[0] == "output_dir"]:
        output_dir = text.partition("=")[2]
    if seed := next((t for t in overrides if t.partition("=")[0] == "seed"), None):
        raise ValueError(f"{seed!r}: each choice has seeds of its own; set them in the file")
    overrides = [t for t in overrides if t.partition("=")[0] != "output_dir"]
    for choice, options in values["choices"].items():
        options = options or {}
        if not isinstance(options, dict):
            raise ValueError(f"choices.{choice} must be a mapping with set and seeds, got {options!r}")
        refuse_unknown(options, ["set", "seeds"], f"choices.{choice}")
        _check_settings(f"choices.{choice}.set", options.get("set"))
        if not isinstance(choice, str) or not re.fullmatch(r"[\w][\w.+-]*", choice):
            raise ValueError(f"choices: a name is made of letters, digits and . + - _, got {choice!r}")
        seeds = options.get("seeds", values.get("seeds", [0]))
        all_valid = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
        if not all_valid or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must be a list of different integers >= 0, got {seeds!r}")
        runs[choice] = []
        for seed in seeds:
            arguments = read_scratch_config(values["base"]).values
            for key, value in {**(values.get("set") or {}), **(options.get("set") or {})}.items():
                override(arguments, f"{key}={json.dumps(value)}")
            for text in overrides:
                override(arguments, text)
            arguments |= {"seed": seed, "output_dir": str(Path(output_dir) / f"{choice}-{seed}")}
            runs[choice].append(parse_scratch_config(arguments))
    tasks = {config.scratch.task for configs in runs.values() for config in configs}
    if len(tasks) > 1:
        raise ValueError(
            f"choices must have one task, or their scores cannot be compared; got {', '.join(sorted(tasks))}"
        )
    return Comparison(runs, Path(output_dir))


def _check_settings(name: str, settings) -> None:
    """Raise `ValueError` unless `settings` is a mapping of overrides without fields that the comparison sets."""
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{name} must be a mapping of overrides, got {settings!r}")
    for key in ("seed", "output_dir"):
        if key in (settings or {}):
            raise ValueError(
                f"{name}.{key} is set by the comparison; use {'seeds' if key == 'seed' else key} beside it"
            )


def compare(comparison: Comparison) -> dict:
    """Train all runs that are not finished and write comparison.json, .md, .svg and .png to output_dir.

    comparison.json: {choice: {seed: what `train_from_scratch` gives, and "provenance": versions, machine, commit}}.
    """
    results, path = {}, comparison.output_dir / RESULTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for choice, configs in comparison.runs.items():
        for config in configs:
            seed, result = str(config.training.seed), train_from_scratch(config)
            stored = before.get(choice, {}).get(seed, {})
            if {**stored, **result} != stored or "provenance" not in stored:
                stored = {**result, "provenance": provenance(config.training.device.type)}
            results.setdefault(choice, {})[seed] = stored
            # After each run, so that an interrupted comparison keeps its results.
            comparison.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, results)
            write_atomically(comparison.output_dir / TABLE, (table(results) + "\n").encode())
    for path in plot(results, comparison.output_dir / f".{FIGURE}"):
        os.replace(path, path.with_name(path.name[1:]))
    return results


def table(results: dict) -> str:
    """Format Markdown: the score of every seed, mean and standard deviation (of one seed: none), tokens, seconds."""
    task = next(iter(next(iter(results.values())).values()))["task"]
    metric = TASKS[task].metric
    lines = [
        f"| attention | {metric} | standard deviation | each seed | parameters | tokens | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for choice, runs in results.items():
        scores = [run["scores"][metric] for run in runs.values()]
        first_run, seconds = next(iter(runs.values())), statistics.mean(run["seconds"] for run in runs.values())
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        seed_scores = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(
            f"| {choice} | {statistics.mean(scores):.2f} | {spread} | {seed_scores} | {first_run['parameters']:,} | "
            f"{first_run['tokens']:,} | {seconds:.0f} |"
        )
    return "\n".join(lines)


@styled
def plot(results: dict, stem: Path) -> list[Path]:
    """Plot training loss against step, one line per choice: the mean over seeds, their range shaded; SVG and PNG."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    # Line styles tell choices apart when there are more of them than colours.
    styles = ("-", "--", "-.", ":")
    colours = ("#000000", *COLOURS)
    for index, (choice, runs) in enumerate(results.items()):
        curves = [dict(map(tuple, run["curve"])) for run in runs.values()]
        steps = sorted(set.intersection(*map(set, curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        style = {"color": colours[index % len(colours)], "linestyle": styles[index % len(styles)]}
        axes.plot(steps, [statistics.mean(v) for v in values], label=f"{choice} ({len(curves)})", **style)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15)
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(title="attention (seeds)", frameon=False)
    return save_figure(figure, stem)
