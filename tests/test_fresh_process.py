"""Saved models load bit-equal in a fresh process, with the package and without it: one row a family and mechanism.

A process takes seconds to start, so with the package one loads all rows; without it each folder brings its own code.
"""

import json
import subprocess
import sys

import pytest
import torch

from distattn_hf import AttentionSpec, convert
from tests.conversion import absolute_models, models
from tests.conversion.models import token_batch
from tests.conversion.nystrom_cases import AUTO, taken
from tests.native.test_save_load import AUTO as NATIVE_AUTO
from tests.native.test_save_load import trained
from tests.without_package import HIDE_PACKAGE

FAMILIES = {**models.FAMILIES, **absolute_models.FAMILIES}
ROWS = {
    "gpt2": "l2",
    "bert": "l1",
    "t5": "sqeuclidean",
    "llama": "cosine",
    "gpt_oss": "l2",
    "gemma2": "l1",
    # The same family once more: each checkpoint runs its own code.
    "llama again": "nystrom",
    "gpt2 again": "retrieval",
    "native causal": ("l2", "relative", "causal"),
    "native bidirectional": ("performer", "sinusoidal", "bidirectional"),
    "native cross": ("nystrom", "rotary", "cross"),
}

# Also where no other checkpoint's code ran before: one of each entry file and mechanism; of all rows gpt2 is the first.
ALONE = ("t5", "llama again", "gpt2 again", "native causal", "native cross")

# "remote" makes the package impossible to import, as on a machine without it.
LOADER = (
    HIDE_PACKAGE
    + """
import json, torch, transformers
mode, folders = sys.argv[1], json.loads(sys.argv[2])
if mode == "package":
    import distattn_hf
else:
    hide_package()
for name, (folder, auto) in folders.items():
    load = getattr(transformers, auto).from_pretrained
    model = load(folder, trust_remote_code=mode == "remote").eval()
    batch, logits = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        first = model(**batch).logits
        model.save_pretrained(f"{folder}/{mode}")
        second = load(f"{folder}/{mode}", trust_remote_code=mode == "remote").eval()(**batch).logits
    print("RESULT", json.dumps([name, torch.equal(first, logits), torch.equal(second, logits), type(model).__name__]))
"""
)


def model_of(row: str):
    """(model, batch, Auto class) of a row."""
    what = ROWS[row]
    if isinstance(what, tuple):
        return *trained(*what), NATIVE_AUTO[what[2]]
    if what == "nystrom":
        model = taken("llama", block_size=4, num_blocks=2)
        return model, token_batch(model, length=40, padded=True, seed=9), AUTO["llama"]
    if what == "retrieval":
        model = convert(FAMILIES["gpt2"](), AttentionSpec(mechanism="retrieval", num_blocks=1))
        return model, token_batch(model, length=120, padded=True, seed=9), AUTO["gpt2"]
    teacher = FAMILIES[row]()
    model = convert(teacher, AttentionSpec(what), calibration=[token_batch(teacher, seed=s) for s in range(3)])
    return model, token_batch(teacher, padded=True, seed=9), AUTO.get(row, AUTO["llama"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{row: (folder, name of the Auto class)}, and {row: name of the class}."""
    folders, classes = {}, {}
    for row in ROWS:
        model, batch, auto = model_of(row)
        folder = tmp_path_factory.mktemp(row.replace(" ", "_"))
        model.save_pretrained(folder)
        with torch.no_grad():
            torch.save((batch, model(**batch).logits), folder / "expected.pt")
        folders[row], classes[row] = (str(folder), auto.__name__), type(model).__name__
    return folders, classes


@pytest.mark.parametrize(
    ("mode", "rows"),
    [("package", [*ROWS]), *(("remote", [row]) for row in ALONE), ("remote", [*ROWS])],
    ids=lambda value: value if isinstance(value, str) else " + ".join(value),
)
def test_every_family_loads_bit_equal(saved, mode, rows, tmp_path, monkeypatch):
    folders, classes = saved
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", LOADER, mode, json.dumps({row: folders[row] for row in rows})]
    run = subprocess.run(command, capture_output=True, text=True)
    results = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert results == [[row, True, True, classes[row]] for row in rows], run.stderr[-2000:]
