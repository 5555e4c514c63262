"""Importance of heads to the loss, by gradient and by ablation, and of tokens to the output."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .intervention import output_projections, replaced_heads
from .rollout import rollout_without_heads
from .samples import TextLoss, check_texts, make_batches, padding_of
from .watch import attention_modules, forward, no_weights, watched


@dataclass
class HeadImportance:
    """One score per head, a list per module, and the loss in nats that they refer to (None: they need none).

    kind: "gradient": Σ over texts x of |∂loss/∂ξ_x|, ξ_x a factor of 1 on the head's output in text x (Michel et al.,
    Are sixteen heads really better than one?, 2019). "ablation": the increase of the loss without the head.
    "magnitude": the mean norm of what the head adds to the hidden states. "rollout": how far the attention rollout of a
    text moves without the head. "induction": see `probes.induction_scores`.
    """

    kind: str
    loss: float | None
    scores: dict[str, list[float]] = field(default_factory=dict)

    def ranking(self) -> list[tuple[str, int, float]]:
        """Return (module, head, score) of all heads, the most important first."""
        scored_heads = [(name, head, score) for name, row in self.scores.items() for head, score in enumerate(row)]
        return sorted(scored_heads, key=lambda item: -item[2])

    def grid(self) -> list[list[float]]:
        """Return one row of scores per module, padded with NaN."""
        width = max(map(len, self.scores.values()), default=0)
        return [row + [float("nan")] * (width - len(row)) for row in self.scores.values()]

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "HeadImportance":
        """Restore the importance from `to_dict`."""
        return cls(**data)


def gradient_importance(model, loss: TextLoss, *, progress: bool = False) -> HeadImportance:
    """Measure the importance of every head by one forward and backward pass over the loss's texts, without changing the
    gradients of parameters. loss: a `TextLoss`, or a `samples.LabelLoss` of batches with labels.

    Raises `ValueError` for a model without attention weights.
    """
    model.eval()
    scores: dict[str, Tensor] = {}
    total, gates = 0.0, []

    def gate(call):
        ones = torch.ones(call.shape[0], call.shape[1], 1, 1, device=call.output.device, dtype=call.output.dtype)
        gates.append((call.name, ones.requires_grad_(True)))
        return call.output * gates[-1][1]

    with torch.enable_grad(), watched(model, gate):
        bar = tqdm(total=len(loss.batches) or 1, desc="importance by gradient", disable=not progress, leave=False)
        for value, weight in loss(model):
            if not gates:
                raise no_weights(model, "has attention modules, but none went through the attention interface")
            gradients = torch.autograd.grad(value * weight, [g for _, g in gates], allow_unused=True)
            for (name, ones), gradient in zip(gates, gradients, strict=True):
                gradient = torch.zeros_like(ones) if gradient is None else gradient
                increment = gradient.double().abs().sum((0, 2, 3)).cpu()
                scores[name] = scores[name] + increment if name in scores else increment
            total += float(value.detach()) * weight
            gates.clear()
            bar.update()
        bar.close()
    return HeadImportance("gradient", total, {name: row.tolist() for name, row in scores.items()})


@torch.no_grad()
def ablation_importance(
    model, loss: TextLoss, *, replacement: str = "zero", means=None, progress: bool = False
) -> HeadImportance:
    """Measure how much the loss grows when each head alone is replaced: one pass over the texts per head."""
    model.eval()
    modules = attention_modules(model)
    if not modules:
        raise no_weights(model, "does not follow transformers' attention interface")
    if unknown := [name for name, entry in modules.items() if entry["num_heads"] is None]:
        raise ValueError(f"cannot tell the number of heads of {unknown[0]!r}")
    baseline = loss.value(model)
    result = HeadImportance("ablation", baseline, {name: [] for name in modules})
    count = sum(entry["num_heads"] for entry in modules.values())
    with tqdm(total=count, desc="importance by ablation", disable=not progress, leave=False) as bar:
        for name, entry in modules.items():
            for head in range(entry["num_heads"]):
                with replaced_heads(model, {name: [head]}, replacement, means):
                    result.scores[name].append(loss.value(model) - baseline)
                bar.update()
    return result


@torch.no_grad()
def magnitude_importance(model, batches: list[dict]) -> HeadImportance:
    """Measure the mean norm ‖W_O[h]·o_h‖₂ of what each head adds to the hidden states, over queries without padding.

    W_O[h]: the columns of the output projection that read the head's output o_h. One forward pass, no loss.
    Raises `ValueError` for no batch, and a module whose outputs do not go straight into a linear layer.
    """
    if not batches:
        raise ValueError("batches is empty: give some text")
    model.eval()
    projections = output_projections(model, batches[0])
    sums: dict[str, tuple[Tensor, int]] = {}
    for batch in batches:

        def add(call, batch=batch):
            layer, size = projections[call.name]
            columns = layer.weight if isinstance(layer, Conv1D) else layer.weight.mT
            added = torch.einsum("bhnd,hdm->bhnm", call.output, columns.unflatten(0, (-1, size)).to(call.output))
            keep = padding_of(model, call, batch)[0]
            norms = (torch.linalg.vector_norm(added.float(), dim=-1) * keep[:, None]).double().sum((0, 2)).cpu()
            total, count = sums.get(call.name, (0.0, 0))
            sums[call.name] = total + norms, count + int(keep.sum())

        with watched(model, add):
            forward(model, batch)
    scores = {name: (total / max(count, 1)).tolist() for name, (total, count) in sums.items()}
    return HeadImportance("magnitude", None, scores)


@torch.no_grad()
def rollout_importance(model, batches: list[dict], **options) -> HeadImportance:
    """Measure how far the attention rollout moves when a head is left out of its layer's mean.

    Σ_ij |R_ij - R_ij without the head| / 2N: the share of a position's rollout that goes elsewhere, mean over texts.
    options: of `attention_rollout`. A layer of one head loses its attention, and passes on what came to it.
    """
    scores: dict[str, Tensor] = {}
    for batch in batches:
        moved = rollout_without_heads(model, batch, **options)
        for name, row in moved.items():
            scores[name] = scores.get(name, 0.0) + row
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    return HeadImportance("rollout", None, {name: (row / count).tolist() for name, row in scores.items()})


def gradient_attribution(model, tokenizer, text: str, *, target: int | None = None, max_length: int = 512) -> dict:
    """Measure how much each token of a text contributes to the output, as gradient × input of its embedding.

    The score is the log-probability of token `target` at the last position (causal models; None: the likeliest one), or
    the negative cross-entropy of the text given itself (encoder-decoders), the mean log-probability of the text's own
    tokens (masked models), or, without a head, ½‖mean hidden state‖². Returns {"tokens" (ids), "values" (N,): signed,
    "score"}. Raises `ValueError` for an empty text or a model without input embeddings.
    """
    from ..data.tasks import TASKS, text_task_of
    from .samples import AnalysisOptions

    text = check_texts(text)[0]
    task = text_task_of(model)
    batch = make_batches(model, tokenizer, [text], AnalysisOptions(max_length=max_length))[0]
    model.eval()
    embeddings: list[Tensor] = []

    def keep(module, arguments, output):
        if not embeddings:
            embeddings.append(output.detach().requires_grad_(True))
            return embeddings[0]
        return output

    source = model.get_encoder() if model.config.is_encoder_decoder else model
    hook = source.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            output = forward(model, batch)
            if task == "embedding":
                score = 0.5 * output.last_hidden_state.float().mean(1).square().sum()
            else:
                rows = output.logits.float().log_softmax(-1)[0]
                if TASKS[task].shifted:
                    score = rows[-1, int(rows[-1].argmax()) if target is None else target]
                else:
                    score = rows.gather(-1, batch["input_ids"][0, :, None]).mean()
            gradient = torch.autograd.grad(score, embeddings[0])[0]
    finally:
        hook.remove()
    values = (gradient * embeddings[0]).sum(-1)[0].detach().double()
    return {"tokens": batch["input_ids"][0].tolist(), "values": values.tolist(), "score": float(score.detach())}
