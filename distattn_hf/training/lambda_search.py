"""Find temperatures: train λ alone on the model's own loss, or search a grid of metrics and λ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..evaluation.score import EvaluationOptions, evaluate_model


@dataclass(frozen=True)
class LambdaResult:
    """losses: mean training loss of each epoch; before and after: {parameter name: λ of each head}."""

    losses: list[float]
    before: dict[str, list[float]]
    after: dict[str, list[float]]


def _lambdas(model) -> dict[str, torch.nn.Parameter]:
    lambdas = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "log_lambda"}
    if not lambdas:
        raise ValueError(
            f"{type(model).__name__} has no λ to train; convert it with AttentionSpec(learnable_lambda=True), or "
            "give the native config mechanism='distance'"
        )
    return lambdas


def optimize_lambda_parameters(
    model, dataloader: Iterable[dict], num_epochs: int = 1, *, learning_rate: float = 0.01, progress: bool = True
) -> LambdaResult:
    """Train λ of every head, and nothing else, on the model's own loss by Adam on log λ.

    Args:
        model: a converted or native model with a head; its other parameters keep their values and `requires_grad`.
        dataloader: batches of model inputs with labels; iterated num_epochs times.

    Raises `ValueError` for a model without trainable λ, batches without labels, an empty dataloader, or a loss that is
    not finite; λ is then restored.
    """
    if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 1:
        raise ValueError(f"num_epochs must be an integer >= 1, got {num_epochs!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate!r}")
    lambdas = _lambdas(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    initial = {name: parameter.detach().clone() for name, parameter in lambdas.items()}
    training = model.training
    optimizer = torch.optim.Adam(lambdas.values(), lr=learning_rate)
    losses = []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in lambdas.values():
            parameter.requires_grad_(True)
        # Dropout would only add noise to the loss.
        model.eval()
        for epoch in range(num_epochs):
            total, count = 0.0, 0
            for batch in tqdm(dataloader, desc=f"λ, epoch {epoch + 1}", disable=not progress):
                loss = _loss(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, count = total + float(loss.detach()), count + 1
            if not count:
                raise ValueError("dataloader gave no batch")
            losses.append(total / count)
    except BaseException:
        with torch.no_grad():
            for name, parameter in lambdas.items():
                parameter.copy_(initial[name])
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)
    before = {name: tensor.exp().tolist() for name, tensor in initial.items()}
    return LambdaResult(losses, before, {name: p.detach().exp().tolist() for name, p in lambdas.items()})


def _loss(model, batch: dict) -> torch.Tensor:
    output = model(**{name: t.to(model.device) if isinstance(t, torch.Tensor) else t for name, t in batch.items()})
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"the model gives no loss for a batch with {sorted(batch)}; batches need labels")
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"the loss is {float(loss.detach())}; nothing was changed")
    return loss


def grid_search(
    model,
    tokenizer,
    texts: Sequence[str],
    *,
    metrics: Sequence[str] = ("l2",),
    lams: Sequence[float | None] = (None,),
    calibration: Sequence[str] | None = None,
    options: EvaluationOptions | None = None,
    progress: bool = True,
) -> list[dict]:
    """Score a checkpoint converted to each metric with each λ, best first.

    Args:
        model: a teacher; it is not changed.
        texts: held-out text to score on, as `evaluate_model` takes it.
        lams: λ of all heads, fixed; None: per head, fitted where there is calibration text, else the metric's default.
        calibration: text for the fit (`init="calibrated"`: also shift and scale); None: `init="plain"`.

    Returns [{"metric", "lam", and the scores}], sorted by perplexity, or for an encoder by mean reciprocal rank.
    Raises `ValueError` for an unknown metric or λ before anything is converted.
    """
    specs = [AttentionSpec(metric=metric, lam=lam, learnable_lambda=lam is None) for metric in metrics for lam in lams]
    if not specs:
        raise ValueError(f"metrics and lams must not be empty, got {list(metrics)} and {list(lams)}")
    options = options or EvaluationOptions(progress=False)
    init = "plain" if calibration is None else "calibrated"
    rows = []
    for spec in tqdm(specs, desc="grid", disable=not progress):
        fit = {"options": CalibrationOptions(progress=False)} if calibration is not None else {}
        student = convert(model, spec, init=init, calibration=calibration, tokenizer=tokenizer, **fit)
        rows.append(
            {"metric": spec.metric, "lam": spec.lam, **evaluate_model(student, tokenizer, texts, options=options)}
        )
    return sorted(rows, key=lambda row: row["perplexity"] if "perplexity" in row else -row["mrr"])
