"""Turn FILEs {"checkpoint", "fits", "teacher"} of softening_quality into records of `conversion_quality`, in place.

    python convert_softening.py FILE ...

Rows keep scores, divergence, alpha, the median of ε/median and the seconds of the fit. A file that is a record already is
left as it is. "runs" says before which commit of the file the rows were measured.
"""

import json
import subprocess
import sys
from pathlib import Path

COMPARED = ("perplexity", "mrr", "cosine")


def converted(old: dict, run: dict) -> dict:
    teacher = old["teacher"]
    rows = [{"key": {"attention": "teacher", "fit": None}, "values": teacher, "seconds": None, "run": 0}]
    for fit in old["fits"]:
        values = {
            **fit["scores"],
            **{f"{n}_ratio": fit["scores"][n] / teacher[n] for n in COMPARED if n in teacher},
            "divergence": fit["divergence"],
            "alpha": fit["alpha"],
            "softening_ratio": fit["softening_ratio"] and fit["softening_ratio"]["median"],
            "convert_seconds": fit["seconds"],
        }
        key = {"attention": fit["metric"], "fit": "plain" if fit["budget"] is None else fit["budget"]}
        rows.append({"key": key, "values": values, "seconds": fit["seconds"], "run": 0})
    options = {
        "checkpoint": old["checkpoint"],
        "metrics": list(dict.fromkeys(f["metric"] for f in old["fits"])),
        "fits": list(dict.fromkeys(row["key"]["fit"] for row in rows[1:])),
        "transform": "scalar",
        "steps": 40,
    }
    return {"experiment": "conversion_quality", "options": options, "runs": [{**run, "options": options}], "rows": rows}


for name in sys.argv[1:]:
    path = Path(name)
    old = json.loads(path.read_text(encoding="utf-8"))
    if "fits" not in old:
        print(f"{name}: a record already")
        continue
    git = ["git", "-C", str(path.resolve().parent), "log", "-1", "--format=%h %cs", "--", path.name]
    commit, date = subprocess.check_output(git, text=True).split()
    new = converted(old, {"measured_before": {"commit": commit, "date": date}})
    path.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{name}: {len(new['rows'])} rows")
