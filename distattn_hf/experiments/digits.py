"""What adaptations cost a vision model: a ViT trained here on scikit-learn's 1,797 digits (8 x 8), a pixel a token.

Each attention is converted, distilled and scored by `adapt`, as `distattn adapt` does it, on pictures the teacher was
not trained on.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..benchmark.measure import only_errors
from ..storage.folders import save_checkpoint
from ..training.adapt import adapt
from ..training.arguments import parse_config

SIZES = {
    "image_size": 8, "patch_size": 1, "num_channels": 1, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_dropout_prob": 0.1,
    "initializer_range": 0.05, "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}  # fmt: skip
# Of 65 tokens a query of retrieval reads the first, nine about it and two blocks of eight.
RETRIEVAL = {
    "mechanism": "retrieval", "num_sinks": 1, "window_size": 4, "block_size": 8, "num_blocks": 2, "min_weight": 0.0,
}  # fmt: skip
ATTENTIONS = {
    **{metric: {"metric": metric} for metric in ("l2", "l1", "cosine", "chebyshev")},
    "l2 ε 0": {"metric": "l2", "softening": 0},
    "retrieval": RETRIEVAL,
    "l2 retrieval": {"metric": "l2", **RETRIEVAL},
}
BATCH, HELD_OUT = 64, 360


@dataclass(frozen=True)
class Options:
    """attentions: of the conversions; "l2 ε 0" is the plain distance. epochs: of the teacher's training. steps: of each
    student's distillation, with batches of 64.
    """

    attentions: tuple[str, ...] = tuple(ATTENTIONS)
    epochs: int = 40
    steps: int = 200

    def __post_init__(self):
        for name in self.attentions:
            if name not in ATTENTIONS:
                raise ValueError(f"attentions must be among {'; '.join(ATTENTIONS)}, got {name!r}")
        for name in ("epochs", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")


QUICK = {"attentions": ("retrieval",), "epochs": 1, "steps": 2}
AXES = ("attentions",)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in a fixed order: pixels (1,797, 1, 8, 8) from -1 to 1, and labels.

    Raises `ValueError` with the install command where scikit-learn is missing.
    """
    if find_spec("sklearn") is None:
        raise ValueError("the digits come with scikit-learn; run: pip install 'distattn_hf[beyond]'")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (pixels[order] / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8), labels[order].astype(np.int64)


def train(pixels: torch.Tensor, labels: torch.Tensor, epochs: int) -> PreTrainedModel:
    """Train a ViT on pictures (n, 1, 8, 8), and return it in eval mode."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            model(pixel_values=pixels[part], labels=labels[part]).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Train the teacher, and measure a row for it and each attention, as converted and adapted."""
    folder = results.path.parent

    @cache
    def prepared() -> tuple[str, str]:
        """Return the folders of the teacher and of the data, written once."""
        from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

        pixels, labels = digits()
        picture = List(List(List(Value("float32"))))
        features = Features({"pixel_values": picture, "label": ClassLabel(names=[str(digit) for digit in range(10)])})
        parts = {"train": slice(HELD_OUT, None), "validation": slice(HELD_OUT)}
        splits = {
            name: Dataset.from_dict({"pixel_values": pixels[part], "label": labels[part]}, features=features)
            for name, part in parts.items()
        }
        DatasetDict(splits).save_to_disk(folder / "data")
        model = train(*(torch.from_numpy(values[HELD_OUT:]) for values in (pixels, labels)), options.epochs)
        save_checkpoint(model, None, folder / "teacher", overwrite=True)
        return str(folder / "teacher"), str(folder / "data")

    for name in options.attentions:

        def measure(name=name) -> dict:
            teacher, data = prepared()
            card = adapt(
                adaptation(ATTENTIONS[name], teacher, data, folder / name.replace(" ", "_"), options.steps),
                say=results.echo,
            )
            scores = {row.name: row.metrics for row in card.rows}
            values = {f"{row}_accuracy": metrics["accuracy"] for row, metrics in scores.items()}
            return {**values, "f1": scores["distillation"]["f1"], "seconds": card.row("distillation").seconds}

        results.row({"attention": name}, measure)


def adaptation(spec: dict, teacher: str, data: str, output: Path, steps: int, batch: int = BATCH):
    """Return the config of one adaptation, as a file of `distattn adapt` would give it."""
    fits = spec.get("mechanism") != "retrieval"
    return parse_config({
        "teacher": teacher, "spec": spec, "init": "calibrated" if fits else "plain", "train_data": data,
        "stages": ["distillation"], "controls": ["plain"] if fits else ["window_only"], "max_steps": steps,
        "learning_rate": 5e-4, "learning_rates": {"attention": 5e-3}, "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": HELD_OUT, "output_dir": str(output), "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    })  # fmt: skip
