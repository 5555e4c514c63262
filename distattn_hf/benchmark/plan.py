"""Which attention suits a model at a length and in so much memory: bytes, a short measurement, what it loses."""

from dataclasses import asdict, dataclass

import torch

from ..conversion.cache_bytes import TOKENS, cache_bytes
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..conversion.observe import in_eval_mode
from ..core.attention_spec import AttentionSpec
from ..core.discovery import max_positions
from .measure import only_errors, time_pair

# Texts below so many tokens leave nothing to gain but a geometry.
SHORT = 4096
# At most so many tokens are read to time a text, and so many pairs and seconds.
TIMED_TOKENS, TIMED_PAIRS, TIMED_SECONDS = 2048, 3, 15.0
# What each was measured to lose on SmolLM2-135M without training (model_cards/README.md; a test compares).
MEASURED = {
    "dot": "nothing: it is the model itself",
    "retrieval": "2,048 tokens: perplexity × 0.998, numbers 20 of the teacher's 20, needles 18 of the teacher's 18",
    "nystrom": "1,024 tokens: perplexity × 1.13 all heads, × 1.05 with max_error=0.4; far text blurs",
}


@dataclass(frozen=True)
class Choice:
    """One attention at one length: bytes of the weights and of the cache of all rows, and whether they fit.

    time_ratio: of reading `timed_tokens` tokens, to the model's own attention, here; None where it was not measured.
    time_spread: the 10th and the 90th percentile of that ratio over the pairs that were timed.
    """

    attention: str
    weight_bytes: int
    cache_bytes: int
    fits: bool
    measured_loss: str
    time_ratio: float | None = None
    timed_tokens: int | None = None
    time_spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """The choices, the one to take (None: none fits), and why."""

    choices: list[Choice]
    take: str | None
    why: str
    dtype: str

    def to_dict(self) -> dict:
        """Return the plan as JSON has it."""
        return asdict(self)


def make_plan(model, length: int, memory: int, *, batch: int = 1, measure: bool = True, say=None) -> Plan:
    """Plan generation with a causal model of transformers: up to `length` tokens in each of `batch` rows.

    Bytes count the weights and the whole cache, without what one step needs beside. Nyström attention is that with
    exact_below=0, of constant size from the first token on.

    Args:
        memory: bytes there are. measure: time reading of the length, 2,048 tokens at most, beside the model's own.
        say: takes a line of text before each attention that is made and timed.

    Raises:
        ValueError: for a native model, one without a growing cache, a length that it has no positions for, or numbers
            below 1.
    """
    for name, value in (("length", length), ("memory", memory), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if (mechanism := getattr(model.config, "mechanism", None)) is not None:
        raise ValueError(
            f"a plan says what to convert a model of transformers to; {type(model).__name__} is a native model with "
            f"mechanism={mechanism!r}. What those cost: distattn benchmark --mechanism native, and distattn experiment "
            "native_decoding"
        )
    if cache_bytes(model) is None:
        raise ValueError(
            f"a plan is about generating with a cache of all keys, which {type(model).__name__} does not have"
        )
    if (most := max_positions(model.config)) is not None and length > most:
        raise ValueError(f"length must be at most the {most:,} positions of {type(model).__name__}, got {length:,}")
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    vocabulary, shape = model.config.get_text_config().vocab_size, (1, min(length, TIMED_TOKENS))
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    choices = []
    with only_errors("transformers", "distattn_hf"), in_eval_mode(model):
        made = {
            "dot": lambda: model, "retrieval": lambda: convert(model, "retrieval"),
            "nystrom": lambda: _nystrom(model, ids),
        }  # fmt: skip
        for name, make in made.items():
            is_timed = measure and name != "dot"
            if is_timed and say is not None:
                say(
                    f"{name}: reads {ids.shape[1]:,} tokens in turns with the model's own attention, {TIMED_PAIRS} "
                    f"times each or for about {TIMED_SECONDS:.0f} seconds"
                )
            candidate = make()
            size = batch * _size(candidate, length)
            timed = _time(model, candidate, ids) if is_timed else {}
            choices.append(Choice(name, weights, size, weights + size <= memory, MEASURED[name], **timed))
    take, why = _advice({choice.attention: choice for choice in choices}, length)
    return Plan(choices, take, why, str(model.dtype).removeprefix("torch."))


def _nystrom(model, ids):
    """Return the model with Nyström attention whose landmarks fit nothing: for its sizes and its speed alone."""
    # Little text and the quickest strategy: what is fitted has no part in either.
    spec = AttentionSpec(mechanism="nystrom", exact_below=0, landmarks="segment_means")
    batch = {"input_ids": ids[:, :128], "attention_mask": torch.ones_like(ids[:, :128])}
    return convert(model, spec, calibration=[batch], options=CalibrationOptions(steps=0, progress=False))


def _size(model, length: int) -> int:
    found = cache_bytes(model)
    return found["constant"] + found["growing"] * length // TOKENS


@torch.no_grad()
def _time(model, candidate, ids) -> dict:
    def read(which):
        return lambda: which(ids, use_cache=False)

    timed = time_pair(
        read(model), read(candidate), "cpu", repeats=TIMED_PAIRS, warmup=1, min_seconds=0, max_seconds=TIMED_SECONDS
    )
    ratio = {name: round(value, 3) for name, value in timed["ratio"].items()}
    spread = ratio["p10"], ratio["p90"]
    return {"time_ratio": ratio["median"], "timed_tokens": ids.shape[1], "time_spread": spread}


def _advice(by_name: dict[str, Choice], length: int) -> tuple[str | None, str]:
    if by_name["retrieval"].fits and length >= SHORT:
        timed = by_name["retrieval"].timed_tokens
        grows = "" if timed is None or timed >= length else f" (at {timed:,} tokens as above; what it saves grows)"
        return "retrieval", f"it fits, reads few of the keys{grows}, loses next to nothing, and all keys are kept"
    if by_name["dot"].fits:
        short = f" below {SHORT:,} tokens" if length < SHORT else ""
        return "dot", f"the model's own attention fits{short}, and loses nothing; take a distance for its geometry"
    if by_name["nystrom"].fits:
        return "nystrom", "no cache of all keys fits; this one's size does not grow, and far text blurs"
    return None, "not even a cache of constant size fits: fewer rows, quantised weights or a smaller model"


def lines(plan: Plan) -> list[str]:
    """Return the lines of a table, and the advice."""
    titles = f"{'attention':<10} {'weights MB':>11} {'cache MB':>10} {'fits':>5} {'time [p10-p90]':>18}"
    made = [f"{titles}  measured on SmolLM2-135M"]
    for choice in plan.choices:
        time = ""
        if choice.time_ratio is not None:
            time = "x {:.2f} [{:.2f}-{:.2f}]".format(choice.time_ratio, *choice.time_spread)
        made.append(
            f"{choice.attention:<10} {choice.weight_bytes / 1e6:>11,.1f} {choice.cache_bytes / 1e6:>10,.1f} "
            f"{'yes' if choice.fits else 'no':>5} {time:>18}  {choice.measured_loss}"
        )
    made.append(f"weights and cache in {plan.dtype}, in which the model is loaded here")
    if timed := next((choice.timed_tokens for choice in plan.choices if choice.timed_tokens), None):
        made.append(f"time: of reading {timed:,} tokens here, to the model's own attention")
    return [*made, f"take {plan.take or 'none of them'}: {plan.why}"]
