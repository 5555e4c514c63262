"""Turn what sequence_speed, sequence_reads and architectures wrote before into records, once."""

import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from distattn_hf.experiments import architectures, sequence_reads, sequence_speed  # noqa: E402

R = Path("model_cards/results")


def write(name, experiment, options, run, rows):
    options = json.loads(json.dumps(vars(options)))
    content = {"experiment": experiment, "options": options, "runs": [{**run, "options": options}], "rows": rows}
    (R / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def row(key, values):
    return {"key": key, "values": values, "seconds": None, "run": 0}


old = json.loads((R / "sequence_parallel.json").read_text())
rows = []
for found in old["measured"]:
    key = {"part": "measured", **{name: found.pop(name) for name in ("mechanism", "processes", "length")}}
    rows.append(row(key, {**found, "shape": old["measured_shape"]}))
for found in old["modelled"]:
    key = {"part": "modelled", **{name: found.pop(name) for name in ("mechanism", "devices")}}
    rows.append(row({**key, "length": old["modelled_length"]}, {**found, "shape": old["modelled_shape"]}))
assert old["assumed"] == {"bandwidth": 50e9, "latency": 1e-5, "rate": 2e14}
write("sequence_speed.json", "sequence_speed", sequence_speed.Options(), old["provenance"], rows)
(R / "sequence_parallel.json").unlink()

old = json.loads((R / "sequence_reads.json").read_text())
rows, said = [], {"modules": len(old["modules"]), "min_weight": old["min_weight"], "num_blocks": old["num_blocks"]}
for found in old["measured"]:
    key = {name: found.pop(name) for name in ("length", "cluster_keys", "processes")}
    bytes_ = sequence_reads.fetched(sequence_speed.THERE, 2**20, key["processes"], found["share"], key["cluster_keys"])
    (same,) = [
        m
        for m in old["modelled"]
        if (m["devices"], m["cluster_keys"], m["share"]) == (key["processes"], key["cluster_keys"], found["share"])
    ] or [None]
    assert same is None or all(same[name] == value for name, value in bytes_.items())
    rows.append(row(key, {**found, **said, **bytes_}))
write("sequence_reads.json", "sequence_reads", sequence_reads.Options(), old["provenance"], rows)

path, rows = Path("tests/sweep/RESULTS.txt"), []
for line in path.read_text(encoding="utf-8").splitlines():
    if line and line[0] not in "#{":
        status, (name, detail) = line[:14].strip(), line[14:].split(maxsplit=1)
        values = {"status": status, "detail": detail}
        if ran := re.fullmatch(r"(\w+), (\d+) modules, \|Δ\| (\S+), control (\S+)", detail):
            kind, modules, difference, control = ran.groups()
            values |= {
                "detail": kind,
                "modules": int(modules),
                "difference": float(difference),
                "control": float(control),
            }
        assert (status in ("exact", "wrong")) == bool(ran), line
        rows.append(row({"model_type": name}, values))
commit, date = subprocess.check_output(["git", "log", "-1", "--format=%h %cs", "--", str(path)], text=True).split()
run = {"transformers": "5.23.0", "measured_before": {"commit": commit, "date": date}}
write("architectures.json", "architectures", architectures.Options(), run, rows)
path.unlink()
