"""What scripts/check_release.sh does with an installed wheel, in an empty folder: python use_release.py ENDPOINT

ENDPOINT: tests/hub/endpoint.py, a Hub on the loopback interface.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TOKEN = "hf_release"
TEXT = ["the cat sat on the mat and the dog sat on the cat"] * 40
# Loads a pushed checkpoint, with the package or, the package being absent, by its own code; prints its loss.
LOAD = """
import sys, torch
repo, mode = sys.argv[1:]
if mode == "package":
    import distattn_hf
else:
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "distattn_hf":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=mode == "remote").eval()
ids = torch.arange(3, 13)[None]
with torch.no_grad():
    print("LOSS", type(model).__name__, model(input_ids=ids, labels=ids).loss.item().hex())
"""


def make_teacher(folder: str) -> None:
    """Save a tiny GPT-2 with random weights and a tokenizer of the words of `TEXT`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"]))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=128, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    Path("text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")


def run(*words: str, **environment: str) -> str:
    """Run a command; print it with the seconds it took, and return what it printed."""
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    shown = words if words[0] == "distattn" else ("load", *words[3:])
    print(f"{time.monotonic() - started:6.1f} s  {' '.join(shown)}", flush=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def main(endpoint: str) -> None:
    """Use every part that a user of the wheel meets first; raises `SystemExit` where one fails."""
    spec = importlib.util.spec_from_file_location("endpoint", endpoint)
    module = sys.modules["endpoint"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import distattn_hf

    package = Path(distattn_hf.__file__).parent
    if not package.is_relative_to(sys.prefix):
        raise SystemExit(f"{package} is no installed package")
    print(run("distattn", "--version").strip())
    print(run("distattn", "check").splitlines()[-1])
    make_teacher("teacher")
    run("distattn", "convert", "teacher", "exact", "--metric", "sqeuclidean", "--init", "exact")
    run("distattn", "convert", "teacher", "l2", "--spec", "configs/attention/l2.yaml", "--calibration", "text.txt",
        "--steps", "4")  # fmt: skip
    run("distattn", "inspect", "l2", "--per-head")
    run("distattn", "evaluate", "l2", "--against", "teacher", "--data", "text.txt", "--max-length", "64")
    with module.Hub(TOKEN) as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(Path("home").resolve())}
        there |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        run("distattn", "push", "l2", "user/l2", "--license", "mit", **there)
        found = {
            mode: run(sys.executable, "-c", LOAD, repo, mode, **there)
            for mode, repo in (("package", "user/l2"), ("remote", "user/l2"))
        }
        local = run(sys.executable, "-c", LOAD, "l2", "package")
    losses = {loaded.split("LOSS", 1)[1].split()[-1] for loaded in (*found.values(), local)}
    if len(losses) != 1:
        raise SystemExit(f"the pushed checkpoint is another model: {found}, local {local}")
    print("loaded from the Hub, with the package and by its own code, and from the folder: equal bit for bit")
    for name in ("training", "native_decoding", "long_context"):
        run("distattn", "experiment", name, "--quick")
    run("distattn", "experiment", "distances", "--config", "configs/experiments/distances.yaml", "--quick")
    run("distattn", "benchmark", "--config", "configs/experiments/benchmark_quick.yaml", "--metrics", "l2", "--lengths",
        "64", "--decode-lengths", "64", "--repeats", "1", "--max-seconds", "1", "--no-memory", "--no-plot")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
