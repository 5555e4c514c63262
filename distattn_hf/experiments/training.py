"""Tasks that tell attentions apart at small size: which of them recall, copy and induce (phase 4 of the research plan).

Small native decoders are trained on fresh examples of synthetic tasks, for every attention, number of items and seed.
What an attention cannot do at this size shows in minutes, where perplexity on text of the same size hardly differs.
"""

import math
import time
from dataclasses import dataclass
from statistics import fmean

import torch

from ..analysis.figure_style import COLOURS, new_figure, save_figure, styled
from ..core.configuration_native import DistAttnConfig
from ..core.modeling_distattn import DistAttnForCausalLM
from ..data.synthetic import IGNORED, TASKS, make_examples

# Budgets well below the length, so that the mechanisms that leave keys out do so. Options of mechanisms by name.
MECHANISM_OPTIONS = {
    "lp": {"p": 3.0},
    "retrieval": {"window_size": 8, "num_sinks": 1, "block_size": 4, "num_blocks": 4},
    "nystrom": {"num_landmarks": 16, "window_size": 8, "num_sinks": 1},
    "local": {"window_size": 8},
    "performer": {"num_features": 32},
}
ATTENTIONS = (
    "dot", "l2", "sqeuclidean", "l1", "lp", "chebyshev", "cosine", "retrieval", "nystrom", "performer", "linear",
    "local",
)  # fmt: skip
# Evaluation examples have seeds that no training batch has.
_HELD_OUT = 2**31
AXES = ("tasks", "attentions", "items", "seeds", "minutes")


@dataclass(frozen=True)
class Options:
    """tasks: mqar, induction, selective_copying. attentions: mechanisms or metrics of `DistAttnConfig`. items: numbers
    of pairs (mqar) or of tokens (selective_copying); induction has one. seeds: each trains once.

    length: tokens of an example. vocab_size. hidden_size, layers, heads, encoding, initializer_range: of the model;
    with weights as small as 0.02 nothing is recalled for thousands of steps. steps: at most; a run stops at the first
    evaluation, every `evaluate_every` steps, with accuracy >= `enough`. batch_size. learning_rate: its peak, after a
    tenth of the steps, then falling as a cosine. examples: of an evaluation. minutes: of a run, after which it stops as
    it is; 0: no limit. test_lengths: of further examples, `test_examples` each, which a model that has `enough` is
    asked after its training: what of it holds beyond `length`.
    """

    tasks: tuple[str, ...] = ("mqar",)
    attentions: tuple[str, ...] = ATTENTIONS
    items: tuple[int, ...] = (4, 8, 16)
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 64
    vocab_size: int = 128
    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    encoding: str = "rotary"
    initializer_range: float = 0.1
    steps: int = 2000
    evaluate_every: int = 100
    enough: float = 0.995
    batch_size: int = 64
    learning_rate: float = 3e-3
    examples: int = 256
    minutes: float = 0.0
    test_lengths: tuple[int, ...] = ()
    test_examples: int = 32

    def __post_init__(self):
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks must be among {', '.join(sorted(TASKS))}, got {task!r}")
            for items in self.items if task != "induction" else (1,):
                for length in (self.length, *self.test_lengths):
                    make_examples(task, 1, length, items=items, vocab_size=self.vocab_size, seed=0)
        for name in ("steps", "evaluate_every", "batch_size", "examples", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.minutes < math.inf:
            raise ValueError(
                f"learning_rate must be > 0 and minutes >= 0, got {self.learning_rate!r} and {self.minutes!r}"
            )
        for attention in self.attentions:
            config_for(self, attention)


QUICK = {
    "tasks": ("mqar", "selective_copying", "induction"),
    "attentions": ("dot", "l2"),
    "items": (2,),
    "seeds": (0,),
    "length": 16,
    "vocab_size": 16,
    "hidden_size": 16,
    "steps": 3,
    "evaluate_every": 2,
    "examples": 16,
    "batch_size": 4,
}


def config_for(options: Options, attention: str) -> DistAttnConfig:
    """Return the config of a decoder with this attention; raises `ValueError` for what does not exist."""
    return DistAttnConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=max(options.length, *options.test_lengths, 64),
        mechanism=attention,
        mechanism_options=dict(MECHANISM_OPTIONS.get(attention, {})),
        positional_encoding=options.encoding,
        initializer_range=options.initializer_range,
        is_decoder=True,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def run(options: Options, results) -> None:
    """Train a model for each task, number of items, attention and seed: a row each."""
    for task in options.tasks:
        for items in options.items if task != "induction" else (1,):
            for attention in options.attentions:
                for seed in options.seeds:
                    key = {"task": task, "items": items, "attention": attention, "seed": seed}
                    results.row(key, lambda k=key: train(options, **k))


def train(options: Options, task: str, items: int, attention: str, seed: int) -> dict:
    """Train one model; return its accuracy on held-out examples, and when it first came to half and to the end.

    accuracy: of the labels asked for. steps: trained. curve: [step, accuracy] of every evaluation. accuracy_at:
    [length, accuracy] of each of `test_lengths`, of a model that has `enough`.
    """
    torch.manual_seed(seed)
    model = DistAttnForCausalLM(config_for(options, attention)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    warm = max(1, options.steps // 10)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def examples(count: int, data_seed: int, length: int = options.length):
        made = make_examples(task, count, length, items=items, vocab_size=options.vocab_size, seed=data_seed)
        return tuple(map(torch.from_numpy, made))

    held_out = examples(options.examples, _HELD_OUT + seed)
    curve, started = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        inputs, labels = examples(options.batch_size, seed * options.steps + step)
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % options.evaluate_every == 0 or step == options.steps:
            curve.append([step, round(accuracy(model, *held_out), 4)])
            late = options.minutes and time.perf_counter() - started > 60 * options.minutes
            if curve[-1][1] >= options.enough or late:
                break
    solved = curve[-1][1] >= options.enough
    longer = [
        [length, accuracy(model, *examples(options.test_examples, _HELD_OUT + seed, length), batch_size=1)]
        for length in (options.test_lengths if solved else ())
    ]
    return {
        "accuracy": curve[-1][1],
        "loss": float(loss.detach()),
        "steps": curve[-1][0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "accuracy_at": longer,
    }


@torch.no_grad()
def accuracy(model, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 64) -> float:
    """Return the share of labels other than -100 that the model finds likeliest."""
    model.eval()
    hits = [
        (model(input_ids=i).logits.argmax(-1) == wanted)[wanted != IGNORED]
        for i, wanted in zip(inputs.split(batch_size), labels.split(batch_size))
    ]
    model.train()
    return float(torch.cat(hits).double().mean())


@styled
def figures(results, folder) -> list:
    """Draw accuracy against the number of items for each task, a line for each attention: the mean over seeds."""
    paths = []
    for task in dict.fromkeys(row["task"] for row in results.rows):
        rows = [row for row in results.rows if row["task"] == task]
        figure = new_figure(6, 4)
        axes = figure.subplots()
        colours, styles = ("#000000", *COLOURS), ("-", "--")
        for number, attention in enumerate(dict.fromkeys(row["attention"] for row in rows)):
            own = [row for row in rows if row["attention"] == attention]
            items = sorted({row["items"] for row in own})
            means = [fmean(row["accuracy"] for row in own if row["items"] == count) for count in items]
            style = styles[number // len(colours) % len(styles)]
            axes.plot(items, means, style, color=colours[number % len(colours)], marker=".", label=attention)
        axes.set(xlabel="pairs" if task == "mqar" else "items", ylabel="accuracy", ylim=(-0.02, 1.02), title=task)
        axes.legend(frameon=False, fontsize=7)
        paths += save_figure(figure, folder / f"training_{task}")
    return paths
