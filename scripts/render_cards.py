"""Write the cards of model_cards/, and the README's table and picture, from the results.

    python scripts/render_cards.py            writes what differs and names it
    python scripts/render_cards.py --check    writes nothing; exit code 1 where something differs

model_cards/templates/NAME.md.j2 becomes model_cards/NAME.md; `choices.md.j2` the part of README.md between its two
markers, and `choices.svg.j2` the picture below it, model_cards/results/choices.svg. A template reads
model_cards/results/NAME.json by `results("NAME")`, what a command measured and wrote, and a table of
results/earlier.json by `earlier("NAME")`: tables that were typed from the output of a run, each with the commit that
brought it, until the run is made again.
"""

import json
import sys
from math import log
from pathlib import Path
from statistics import fmean, stdev

import jinja2

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
README, START, END = ROOT / "README.md", "<!-- choices: rendered -->\n", "<!-- /choices -->\n"
CHOICES, PICTURE = "choices.md.j2", "choices.svg.j2"
RETRIEVAL = "retrieval, weight 0.003"


def results(name: str) -> dict:
    """Return what model_cards/results/NAME.json holds."""
    return json.loads((CARDS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def results_if_any(name: str) -> dict | None:
    """Return what model_cards/results/NAME.json holds; None where nobody has measured it yet."""
    return results(name) if (CARDS / "results" / f"{name}.json").is_file() else None


def table(columns: list[str], rows: list[list]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def earlier(name: str) -> str:
    """Return a table of results/earlier.json, and when it was measured."""
    found = results("earlier")[name]
    before = found["measured_before"]
    note = f"*(Measured before commit {before['commit']} of {before['date']}; not measured again since.)*"
    return f"{table(found['columns'], found['rows'])}\n\n{note}"


def rows_of(name: str, **where) -> list[dict]:
    """Return the rows of an experiment's results whose key or values are these, key and values in one dict."""
    merged = [{**row["key"], **row["values"]} for row in results(name)["rows"]]
    return [row for row in merged if all(row.get(field) == value for field, value in where.items())]


def pivot(name: str, down: str, across: str, value: str, digits: int = 3, **where) -> str:
    """Return a table of one value of an experiment: a row for each `down`, a column for each `across`.

    Of several rows, seeds say, their mean and standard deviation.
    """
    chosen = [row for row in rows_of(name, **where) if row.get(value) is not None]
    columns = list(dict.fromkeys(row[across] for row in chosen))
    lines = []
    for head in dict.fromkeys(row[down] for row in chosen):
        cells = []
        for column in columns:
            found = [row[value] for row in chosen if (row[down], row[across]) == (head, column)]
            text = f"{fmean(found):.{digits}f}" if found else "-"
            cells.append(text + (f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""))
        lines.append([head, *cells])
    return table([down.replace("_", " "), *(f"{across.replace('_', ' ')} {column}" for column in columns)], lines)


def adapted(name: str, column: str, value: str) -> str:
    """Return the table of an experiment's adaptations: accuracies, and one value more under a name of its column."""
    lines = []
    for row in rows_of(name):
        swapped = row.get("plain_accuracy", row.get("window_only_accuracy"))
        numbers = (swapped, row["calibrated_accuracy"], row["distillation_accuracy"], row[value])
        lines.append([row["attention"], *(f"{number:.4f}" for number in numbers)])
    return table(["attention", "swapped", "converted", "distilled", column], lines)


def compared(name: str) -> str:
    """Return the table of what `distattn compare` wrote: perplexities, and of several seeds their deviation."""
    lines = []
    for choice, runs in results(name).items():
        scores = [run["scores"]["perplexity"] for run in runs.values()]
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else ""
        lines.append([choice, f"{fmean(scores):.1f}", spread, ", ".join(f"{score:.1f}" for score in scores)])
    return table(["attention", "perplexity", "standard deviation", "each seed"], lines)


def quantised() -> str:
    """Return the table of what 8 bits cost; ratios to the same attention without."""
    rows = {(row["attention"], row["int8"]): row for row in rows_of("quantised")}
    lines = []
    for (name, part), row in rows.items():
        whole = rows[name, "nothing"]
        ratio = row["perplexity"] / whole["perplexity"]
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("weight_bytes", "cache_bytes")]
        lines.append([name, part, f"{row['perplexity']:.3f}", f"× {ratio:.4f}", *sizes])
    options = results("quantised")["options"]
    note = (
        f"{options['checkpoint']}, {options['scored_tokens']} tokens of {options['data']} after "
        f"{options['prompt_tokens']:,}; int8 weights by torchao, the cache by HQQ with a scale for "
        f"{options['group_size']} numbers, the last {options['residual_tokens']} tokens as they are."
    )
    columns = ["attention", "8 bits", "perplexity", "to the same without", "weights, MB", "keys and values, MB"]
    return f"{note}\n\n{table(columns, lines)}"


def choices() -> dict[str, dict]:
    """Return the figures of the README's table and picture, of SmolLM2's perplexity and of forward passes on a CPU.

    {name: {"loss" and "other" (of the plain distance, or of all heads; may be None): perplexity over the teacher's,
    at "text" tokens, "time" (None: not measured): over plain attention's, at "length" tokens, "of" what else than the
    perplexity, "softening": ε/median}}.
    """
    exact = {row[0]: float(row[1].split(" ")[0]) for row in results("earlier")["exact_speed"]["rows"]}
    softened = {row["metric"]: row["ratio"]["median"] for row in results("softened_speed")["results"]
                if row["pass"] == "forward"}  # fmt: skip
    found = {
        "sqeuclidean": {
            "loss": 1.0,
            "other": None,
            "time": exact["sqeuclidean"],
            "length": 2048,
            "text": "any",
            "of": "",
        }
    }
    for metric in ("l2", "cosine", "l1", "lp", "chebyshev"):
        (fit,) = rows_of("softening_smollm2", attention=metric, fit=0.004)
        plain = rows_of("softening_smollm2", attention=metric, fit="plain")
        found[metric] = {
            "loss": fit["perplexity_ratio"], "softening": fit["softening_ratio"],
            "other": plain[0]["perplexity_ratio"] if plain else None, "length": 2048, "text": "512",
            "of": ", ε = 0" if metric == "cosine" else "",
            # Cosine was timed without ε alone.
            "time": exact["cosine"] if metric == "cosine" else softened.get(metric),
        }  # fmt: skip
    (read,) = rows_of("retrieval_speed", job="prefill", length=32768, key_heads=12, blocks=8, cluster_keys=True)
    found["retrieval"] = {"loss": retrieved(4096), "other": None, "time": 1 / read["ratio"], "length": 32768}
    found["retrieval"] |= {"text": "4,096", "of": ", 8 blocks"}
    landmarks = results("earlier")["nystrom_smollm2_landmarks"]
    whole, limited = (float(landmarks["rows"][2][i].split(" ")[0]) / landmarks["teacher"] for i in (1, 3))
    faster = float(results("earlier")["nystrom_speed"]["rows"][2][4])
    found["nystrom"] = {"loss": limited, "other": whole, "time": 1 / faster, "length": 16384}
    found["nystrom"] |= {"text": "1,024", "of": ", all heads"}
    return found


def of_retrieval(task: str, length: int) -> str:
    """Return the student of `long_context` that is retrieval: blocks of alike keys; of the text where they lack."""
    clustered = rows_of("long_context", task=task, length=length, student=RETRIEVAL)
    return RETRIEVAL if clustered else f"{RETRIEVAL}, blocks of the text"


def retrieved(length: int) -> float:
    """Return SmolLM2's perplexity with retrieval over the teacher's, at the end of texts of this length."""
    students = (of_retrieval("perplexity", length), "teacher")
    asked = {"task": "perplexity", "length": length}
    own, teacher = (rows_of("long_context", student=name, **asked)[0]["perplexity"] for name in students)
    return own / teacher


def sweep() -> dict[str, int]:
    """Return how many architectures have each outcome of the experiment `architectures`, and "tested"."""
    kinds = [row["status"] for row in rows_of("architectures")]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {**counts, "tested": len(kinds) - counts["not built"]}


def rendered() -> dict[Path, str]:
    """Return the text that each card, and README.md, should have."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "results": results,
        "results_if_any": results_if_any,
        "table": table,
        "earlier": earlier,
        "sweep": sweep,
        "adapted": adapted,
        "compared": compared,
        "quantised": quantised,
        "choices": choices,
        "log": log,
        "of_retrieval": of_retrieval,
        "retrieved": retrieved,
        "rows_of": rows_of,
        "pivot": pivot,
    }
    names = sorted(path.name for path in (CARDS / "templates").glob("*.md.j2"))
    texts = {name: environment.get_template(name).render() for name in names}
    readme = README.read_text(encoding="utf-8")
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: {START.strip()} and {END.strip()} must each be there once")
    before, after = readme.partition(START)[0], readme.partition(END)[2]
    found = {CARDS / name.removesuffix(".j2"): text for name, text in texts.items() if name != CHOICES}
    picture = {CARDS / "results" / "choices.svg": environment.get_template(PICTURE).render()}
    return found | picture | {README: before + START + texts[CHOICES] + END + after}


def main(arguments: list[str]) -> int:
    """Write, or with --check compare, and name what differs."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    differ = {
        path: text for path, text in rendered().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in differ.items():
        print(path.relative_to(ROOT))
        if not arguments:
            path.write_text(text, encoding="utf-8")
    return 1 if arguments and differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
