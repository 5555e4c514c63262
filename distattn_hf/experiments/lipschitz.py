"""Is distance attention steadier than dot-product attention? Lipschitz constants, and a disturbed SmolLM2.

Two parts. "constant": self-attention with tied projections and random weights, the bound of Kim, Papamakarios and Mnih
(2021) beside the steepest points that gradient ascent finds, for dot product, the paper's L2 attention ("sqeuclidean")
and the plain distance ("l2", without a theorem), over the number of tokens and the size of the inputs. What is measured
is a lower bound of the constant. "robustness": perplexity of a checkpoint and of its conversions where keys of some
tokens are ten times as long, and where some words are replaced by another, "AAA".

Converted checkpoints have untied projections (W_K ≠ W_Q) and values that are not mapped by A: the bound says nothing
about them. Whether they are steadier all the same is what the second part asks.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch

from ..analysis.figure_style import COLOURS, new_figure, save_figure, styled
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.discovery import find_attention_modules, locate
from ..data.sources import calibration_and_held_out
from ..evaluation.score import EvaluationOptions, evaluate_model
from ..functional.lipschitz_bounds import ATTENTIONS, SelfAttention, infinity_norm, spectral_norm, steepest_points
from ..storage.models import load_checkpoint

PARTS = ("constant", "robustness")
DISTURBANCES = ("none", "keys", "words")
WORD = "AAA"
# Texts that calibrate, at most.
_CALIBRATION = 200
AXES = ("parts", "attentions", "num_tokens", "scales", "metrics", "disturbances")


@dataclass(frozen=True)
class Options:
    """parts: constant, robustness. attentions: dot, sqeuclidean, l2. num_tokens: N. scales: inputs are scale·N(0, I).
    width, heads: D and H. seeds: how many draws of weights and inputs. steps: of gradient ascent.

    checkpoint: a name or folder of a causal model with modules k_proj or c_attn. metrics: of its conversions; "teacher"
    is the model itself. disturbances: none, keys, words. key_factor, key_share: how much longer the keys of which share
    of tokens. word_share: of words replaced. data: "news", or texts as `distattn evaluate` takes them, the last tenth
    of which is scored. max_length, max_tokens: scored. calibration_tokens, calibration_steps: of the fits.
    """

    parts: tuple[str, ...] = PARTS
    attentions: tuple[str, ...] = ATTENTIONS
    num_tokens: tuple[int, ...] = (16, 64, 256, 1024)
    scales: tuple[float, ...] = (1.0, 4.0, 16.0)
    width: int = 16
    heads: int = 2
    seeds: int = 2
    steps: int = 10
    checkpoint: str = "smollm2-135m"
    metrics: tuple[str, ...] = ("teacher", "l2", "l1", "cosine")
    disturbances: tuple[str, ...] = DISTURBANCES
    key_factor: float = 10.0
    key_share: float = 0.05
    word_share: float = 0.025
    data: str = "news"
    max_length: int = 512
    max_tokens: int = 8192
    calibration_tokens: int = 8192
    calibration_steps: int | None = None

    def __post_init__(self):
        for name, allowed in (("parts", PARTS), ("attentions", ATTENTIONS), ("disturbances", DISTURBANCES)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be among {', '.join(allowed)}, got {value!r}")
        if min(self.num_tokens, default=0) < 2:
            raise ValueError(f"num_tokens must be integers >= 2, got {self.num_tokens!r}")
        if min(self.scales, default=0) <= 0 or self.key_factor <= 0:
            raise ValueError(f"scales and key_factor must be > 0, got {self.scales!r} and {self.key_factor!r}")
        for name in ("seeds", "width", "heads", "max_length", "max_tokens", "calibration_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width={self.width}, got {self.heads}")
        for name in ("key_share", "word_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")


QUICK = {
    "parts": ("constant",),
    "attentions": ("dot", "sqeuclidean"),
    "num_tokens": (2, 6),
    "scales": (1.0, 8.0),
    "width": 4,
    "seeds": 1,
    "steps": 2,
}


def run(options: Options, results) -> None:
    """Measure the parts' rows: a Lipschitz constant or a perplexity each."""
    if "constant" in options.parts:
        for num_tokens in options.num_tokens:
            for scale in options.scales:
                for attention in options.attentions:
                    key = {"part": "constant", "attention": attention, "num_tokens": num_tokens, "scale": scale}
                    results.row(key, lambda a=attention, n=num_tokens, s=scale: _constant(options, a, n, s))
    if "robustness" in options.parts:
        for metric in options.metrics:
            for disturbance in options.disturbances:
                key = {"part": "robustness", "attention": metric, "disturbance": disturbance}
                results.row(key, lambda m=metric, d=disturbance: _robustness(options, m, d))


def _constant(options: Options, attention: str, num_tokens: int, scale: float) -> dict:
    """Return the largest norms over seeds and starts, at random points and after ascent, and the least bounds."""
    values, bounds = [], []
    for seed in range(options.seeds):
        function = SelfAttention.random(attention, options.width, options.heads, seed)
        generator = torch.Generator().manual_seed(seed)
        start = scale * torch.randn(num_tokens, options.width, generator=generator, dtype=torch.float64)
        # A token at 0 sees all others alike: where the paper shows dot-product attention to have no bound.
        at_zero = start.clone()
        at_zero[0] = 0
        for points in (start, at_zero):
            steepest, norm = steepest_points(function, points, steps=options.steps)
            values.append((spectral_norm(function, points, iterations=10)[0], norm, infinity_norm(function, steepest)))
        if attention == "sqeuclidean":
            bounds.append(function.bounds(num_tokens))
    at_random, after_ascent, infinity = (max(column) for column in zip(*values))
    least = {f"bound_{name}": min(b[name] for b in bounds) for name in ("2", "inf")} if bounds else {}
    return {
        "at_random_points": at_random,
        "measured_2": after_ascent,
        "measured_inf": infinity,
        "bound_2": least.get("bound_2"),
        "bound_inf": least.get("bound_inf"),
    }


@contextmanager
def longer_keys(model, factor: float, share: float, seed: int = 0):
    """Multiply the keys of a share of the tokens by `factor` within the context, the same in every layer and model.

    On the output of k_proj, or the middle third of that of GPT-2's c_attn, so before a rotary embedding, which keeps
    norms. Raises `ValueError` for attention with neither.
    """
    modules = [locate(model, name) for name in find_attention_modules(model)]
    projections = [getattr(module, "k_proj", None) or getattr(module, "c_attn", None) for module in modules]
    if not projections or None in projections:
        raise ValueError(f"checkpoint must have attention with a k_proj or c_attn, got {type(model).__name__}")
    fused = [not hasattr(module, "k_proj") for module in modules]

    def scale(module, inputs, output):
        generator = torch.Generator().manual_seed(seed)
        chosen = (torch.rand(output.shape[:2], generator=generator) < share)[..., None].to(output.device)
        return torch.where(chosen, output * factor, output)

    def scale_third(module, inputs, output):
        query, key, value = output.chunk(3, -1)
        return torch.cat([query, scale(module, inputs, key), value], -1)

    hooks = [p.register_forward_hook(scale_third if f else scale) for p, f in zip(projections, fused)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def replace_words(text: str, share: float, seed: int = 0) -> str:
    """Replace a share of a text's words by "AAA" (the word-swap contamination of Han et al., 2022)."""
    draw = Random(seed)
    return " ".join(WORD if word and draw.random() < share else word for word in text.split(" "))


def _robustness(options: Options, metric: str, disturbance: str) -> dict:
    model, tokenizer = _converted(
        options.checkpoint, metric, options.data, options.calibration_tokens, options.calibration_steps
    )
    texts = calibration_and_held_out(options.data)[1]
    if disturbance == "words":
        texts = [replace_words(text, options.word_share, seed) for seed, text in enumerate(texts)]
    scored = EvaluationOptions(max_length=options.max_length, max_tokens=options.max_tokens, progress=False)

    def score():
        return evaluate_model(model, tokenizer, texts, options=scored)["perplexity"]

    if disturbance != "keys":
        return {"perplexity": score()}
    with longer_keys(model, options.key_factor, options.key_share):
        return {"perplexity": score()}


@lru_cache(maxsize=2)
def _converted(checkpoint: str, metric: str, data: str, tokens: int, steps: int | None):
    if metric == "teacher":
        return load_checkpoint(checkpoint)
    model, tokenizer = _converted(checkpoint, "teacher", data, tokens, steps)
    options = CalibrationOptions(max_tokens=tokens, progress=False, **({} if steps is None else {"steps": steps}))
    texts = calibration_and_held_out(data)[0][:_CALIBRATION]
    return convert(model, AttentionSpec(metric), calibration=texts, tokenizer=tokenizer, options=options), tokenizer


@styled
def figures(results, folder) -> list:
    """Draw the measured constants and the bound against N, a line for each attention and size of the inputs."""
    rows = [row for row in results.rows if row["part"] == "constant"]
    if not rows:
        return []
    figure = new_figure(6, 4)
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    scales = sorted({row["scale"] for row in rows})
    for colour, attention in zip(COLOURS, dict.fromkeys(row["attention"] for row in rows)):
        for style, scale in zip(styles, scales):
            line = [row for row in rows if (row["attention"], row["scale"]) == (attention, scale)]
            x = [row["num_tokens"] for row in line]
            axes.plot(
                x, [row["measured_2"] for row in line], style, color=colour, marker=".", label=f"{attention}, {scale:g}"
            )
    bounded = {row["num_tokens"]: row["bound_2"] for row in rows if row["bound_2"] is not None}
    axes.plot(list(bounded), list(bounded.values()), color="black", label="bound of sqeuclidean")
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="‖Jacobian‖₂")
    axes.legend(frameon=False, fontsize=7, title="attention, size of inputs")
    return save_figure(figure, folder / "lipschitz")
