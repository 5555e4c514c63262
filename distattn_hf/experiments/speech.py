"""What adaptations cost a model of speech: a Whisper trained here on strings of digits that a formant synthesiser says.

Ten syllables stand for the digits: a buzz with two resonances that glide, as those of vowels do, by voices of random
pitch, speed, tract and loudness in noise. Each attention is converted, distilled and scored by `adapt`, as `distattn
adapt` does it, on strings the teacher was not trained on; then transcripts are generated.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import PreTrainedModel, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ..benchmark.measure import only_errors
from ..storage.folders import save_checkpoint
from ..storage.models import load_checkpoint
from ..training.adapt import adapt
from .digits import adaptation

RATE, SECONDS = 8000, 1
# First and second resonance of each digit's syllable in Hz, at its beginning and at its end.
FORMANTS = (
    ((280, 2300), (500, 900)), ((300, 800), (650, 1250)), ((300, 1600), (290, 850)), ((400, 1700), (280, 2350)),
    ((600, 900), (550, 900)), ((750, 1200), (300, 2200)), ((390, 2000), (400, 1950)), ((550, 1850), (600, 1200)),
    ((550, 2100), (280, 2500)), ((750, 1300), (290, 2250)),
)  # fmt: skip
START, END = 10, 11
SIZES = {
    "vocab_size": 12, "num_mel_bins": 40, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "max_source_positions": 50 * SECONDS, "max_target_positions": 16, "decoder_start_token_id": START,
    "bos_token_id": START, "eos_token_id": END, "pad_token_id": END, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
RETRIEVAL = {
    "mechanism": "retrieval", "num_sinks": 1, "window_size": 8, "block_size": 8, "num_blocks": 3, "min_weight": 0.0,
}  # fmt: skip
ATTENTIONS = {
    **{metric: {"metric": metric} for metric in ("l2", "l1", "cosine", "chebyshev")},
    "retrieval": RETRIEVAL,
}
BATCH, HELD_OUT = 32, 320


@dataclass(frozen=True)
class Options:
    """attentions: of the conversions. strings: said to the teacher, and held out besides are 320. epochs: of the
    teacher's training. steps: of each student's distillation, with batches of 32.
    """

    attentions: tuple[str, ...] = tuple(ATTENTIONS)
    strings: int = 2560
    epochs: int = 24
    steps: int = 150

    def __post_init__(self):
        for name in self.attentions:
            if name not in ATTENTIONS:
                raise ValueError(f"attentions must be among {'; '.join(ATTENTIONS)}, got {name!r}")
        for name in ("strings", "epochs", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")


QUICK = {"attentions": ("l2",), "strings": 64, "epochs": 1, "steps": 2}
AXES = ("attentions",)


def say(digits: list[int], random: np.random.Generator) -> np.ndarray:
    """Return the wave of digits by a voice that is drawn: float32 of `SECONDS` at `RATE`, from -1 to 1."""
    pitch, tract, loud = random.uniform(90, 260), random.uniform(0.88, 1.14), random.uniform(0.3, 1.0)
    parts = [np.zeros(int(RATE * random.uniform(0.01, 0.08)))]
    for digit in digits:
        count = int(RATE * random.uniform(0.18, 0.27))
        glide = np.linspace(0, 1, count)[:, None]
        resonances = tract * (np.array(FORMANTS[digit][0]) * (1 - glide) + np.array(FORMANTS[digit][1]) * glide)
        tone = pitch * (1 + 0.06 * np.sin(2 * np.pi * random.uniform(3, 6) * np.arange(count) / RATE))
        harmonics = np.arange(1, int(3900 / pitch))
        phase = 2 * np.pi * np.cumsum(tone)[:, None] / RATE * harmonics
        # How much each resonance lets through of each harmonic, over a buzz that falls with 1/n.
        gain = sum(1 / (1 + ((harmonics * pitch - f[:, None]) / 110) ** 2) for f in resonances.T)
        wave = (np.sin(phase) * gain / harmonics**0.5).sum(1) * np.hanning(count) ** 0.3
        parts += [wave / np.abs(wave).max(), np.zeros(int(RATE * random.uniform(0.0, 0.03)))]
    wave = loud * np.concatenate(parts)[: RATE * SECONDS]
    wave = np.pad(wave, (0, RATE * SECONDS - len(wave)))
    return (0.6 * wave + random.uniform(0.002, 0.03) * random.normal(size=len(wave))).clip(-1, 1).astype(np.float32)


def strings(count: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    """Return log-mel spectra (count, 40, frames) of strings of one to three digits, and their tokens with the end's."""
    random = np.random.default_rng(seed)
    digits = [random.integers(0, 10, size=random.integers(1, 4)).tolist() for _ in range(count)]
    extractor = WhisperFeatureExtractor(
        feature_size=40, sampling_rate=RATE, hop_length=80, n_fft=200, chunk_length=SECONDS
    )
    waves = [say(each, random) for each in digits]
    spectra = extractor(waves, sampling_rate=RATE, return_tensors="np")["input_features"].astype(np.float32)
    return spectra, [[*each, END] for each in digits]


def train(spectra: torch.Tensor, labels: list[list[int]], epochs: int) -> PreTrainedModel:
    """Train a Whisper on spectra (n, 40, frames) and tokens, and return it in eval mode."""
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES)).train()
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in labels], True, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(rows) // BATCH))
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(BATCH):
            optimizer.zero_grad()
            model(input_features=spectra[part], labels=rows[part]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def right(model: PreTrainedModel, spectra: np.ndarray, labels: list[list[int]]) -> float:
    """Return the share of strings that greedy generation transcribes without a fault."""
    written = model.generate(torch.from_numpy(spectra), max_new_tokens=5, do_sample=False)
    # Whisper leaves out the start, and of the longest the end.
    found = [[token for token in row if token != START] + [END] for row in written.tolist()]
    return sum(a[: a.index(END) + 1] == b for a, b in zip(found, labels, strict=True)) / len(labels)


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Train the teacher, and measure a row for it and each attention, as converted and adapted."""
    folder, held_out = results.path.parent, strings(HELD_OUT, 1)

    @cache
    def prepared() -> tuple[str, str, float]:
        """Return the folders of the teacher and of the data, written once, and the teacher's share of strings."""
        from datasets import Dataset, DatasetDict, Features, List, Value

        features = Features({"input_features": List(List(Value("float32"))), "labels": List(Value("int64"))})
        said = strings(options.strings, 0)
        splits = {
            name: Dataset.from_dict({"input_features": spectra, "labels": labels}, features=features)
            for name, (spectra, labels) in {"train": said, "validation": held_out}.items()
        }
        DatasetDict(splits).save_to_disk(folder / "data")
        model = train(torch.from_numpy(said[0]), said[1], options.epochs)
        save_checkpoint(model, None, folder / "teacher", overwrite=True)
        return str(folder / "teacher"), str(folder / "data"), right(model, *held_out)

    for name in options.attentions:

        def measure(name=name) -> dict:
            teacher, data, teacher_right = prepared()
            config = adaptation(ATTENTIONS[name], teacher, data, folder / name, options.steps, BATCH)
            card = adapt(config, say=results.echo)
            student = load_checkpoint(str(folder / name / "student"))[0]
            values = {f"{row.name}_accuracy": row.metrics["accuracy"] for row in card.rows}
            strings_right = {"teacher_right": teacher_right, "distillation_right": right(student, *held_out)}
            return {**values, **strings_right, "seconds": card.row("distillation").seconds}

        results.row({"attention": name}, measure)
