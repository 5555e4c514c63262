"""Check before an upload that the folder loads offline, with and without the package, with equal logits."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

WAYS = {"package": "after import distattn_hf", "remote": "with trust_remote_code=True, without the package"}

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

# Run in a fresh interpreter, which must not have the package when it loads the folder's own copy of the code.
_LOADER = """
import inspect, sys, torch
folder, auto_class, way, out = sys.argv[1:]
if way == "package":
    import distattn_hf
else:
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "distattn_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
import transformers
from safetensors.torch import save_file

model, info = getattr(transformers, auto_class).from_pretrained(
    folder, trust_remote_code=way == "remote", output_loading_info=True
)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if names := sorted(map(str, info[kind])):
        raise ValueError(f"{kind.replace('_', ' ')} in the weights: {names[0]} ({len(names)} in all)")
if (way == "remote") != type(model).__module__.startswith("transformers_modules"):
    raise ValueError(f"{type(model).__name__} came from {type(model).__module__}")

config = model.config.get_text_config()
if model.main_input_name == "input_ids":
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = (7 * torch.arange(length) + 3) % config.vocab_size
    if isinstance(eos := getattr(config, "eos_token_id", None), int) and eos < config.vocab_size:
        ids[-1] = eos  # some classifiers read the model's state there
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        batch["decoder_input_ids"] = ids[None, : length // 2]
elif model.main_input_name == "pixel_values":
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    values = torch.arange(model.config.num_channels * height * width, dtype=torch.float32)
    batch = {"pixel_values": torch.sin(values).view(1, -1, height, width).to(model.dtype)}
else:
    raise ValueError(f"no test input for models whose main input is {model.main_input_name!r}")
with torch.no_grad():
    outputs = model.eval()(**batch)
found = {n: t for n, t in outputs.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
for name, tensor in found.items():
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite values")
save_file({n: t.clone().contiguous() for n, t in found.items()}, out)
"""


def check_reload(path: str | Path, auto_class: str) -> None:
    """Load the folder in two fresh offline processes and compare the models' outputs for one fixed input, bit by bit.

    It runs the Python files in the folder. Modules are copied to a separate cache, so that the check fails if the
    folder lacks a file. Raises `ValueError` saying which way failed and why, or which output differs.
    """
    path = Path(path).absolute()
    outputs = {}
    with tempfile.TemporaryDirectory(prefix="distattn_reload_") as scratch:
        for way in tqdm(WAYS, desc="reload check", disable=None, leave=False):
            out = Path(scratch) / f"{way}.safetensors"
            _load(path, auto_class, way, out, Path(scratch) / f"modules_{way}")
            outputs[way] = load_file(out)
    first, second = outputs.values()
    if not first or first.keys() != second.keys():
        raise ValueError(f"reload check: the outputs are {sorted(first)} {WAYS['package']}, but {sorted(second)} "
                         f"{WAYS['remote']}")  # fmt: skip
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise ValueError(
                f"reload check: {name} {WAYS['package']} and {WAYS['remote']} differ; the Python files in the folder "
                "are not those of the installed package: save the model again with its save_pretrained"
            )


def _load(path: Path, auto_class: str, way: str, out: Path, modules: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # The parent may have imported the package from its working directory.
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _LOADER, str(path), auto_class, way, str(out)]
    process = subprocess.run(
        command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if process.returncode != 0:
        raise ValueError(f"reload check: loading {WAYS[way]} failed: {_reason(process.stderr, process.returncode)}")


def _reason(stderr: str, returncode: int) -> str:
    """Return the exception message at the end of a traceback, which may span several lines."""
    lines = stderr.rstrip().splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith(("  ", "Traceback"))), default=-1)
    return " ".join(line.strip() for line in lines[last_frame + 1 :])[:600] or f"exit status {returncode}"
