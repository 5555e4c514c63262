"""Metrics for the `evaluate` library that ship with this package, so that none is downloaded.

```python
metric = Perplexity()
for batch in loader:
    metric.add_batch(predictions=model(**batch).logits, references=batch["labels"])
metric.compute()  # {"perplexity": ..., "loss": ..., "num_tokens": ...}
```

`add_batch` reduces its inputs at once to a few numbers per row, so a batch of logits is never written to disk
(`Retrieval` keeps the embeddings). All three take `predictions` and `references` only and go into `evaluate.combine`.
"""

import math
import uuid
from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import label_loss
from .score import retrieval_ranks


class _PackagedMetric(evaluate.Metric):
    """An `evaluate.Metric` whose files do not collide with another process's, and whose config name is checked.

    num_process=1: each instance gets an experiment_id of its own. num_process > 1: the processes of one evaluation must
    share one, so it has to be given (`evaluate`'s own default would mix two evaluations on one machine).
    """

    CONFIG_NAMES: tuple[str, ...] = ("default",)

    def __init__(self, config_name: str | None = None, *, num_process: int = 1, experiment_id=None, **options):
        if config_name not in (None, *self.CONFIG_NAMES):
            raise ValueError(f"config_name must be one of {', '.join(self.CONFIG_NAMES)}, got {config_name!r}")
        if experiment_id is None:
            if num_process > 1:
                raise ValueError(
                    f"experiment_id must be given for num_process={num_process}: the same in every process of one "
                    "evaluation, another in any other; got None"
                )
            experiment_id = uuid.uuid4().hex
        super().__init__(config_name, num_process=num_process, experiment_id=experiment_id, **options)

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Return the scores of all items added (and of predictions and references, if given); None in processes > 0."""
        scores = super().compute(predictions=predictions, references=references, **kwargs)
        if self.num_process == 1:
            # No other process uses a lock of this name, and evaluate would leave one file per instance.
            for path in self.file_paths or ():
                Path(f"{path}.lock").unlink(missing_ok=True)
        return scores


def _info(description: str, inputs: str, features: dict) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(features)
    )


def _tensor(name: str, value, dims: tuple[int, ...], shapes: str) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value).detach()
    if tensor.dim() not in dims:
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(tensor.shape)}")
    return tensor


def _check_shapes(predictions: Tensor, references: Tensor) -> None:
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions must have the references' shape {tuple(references.shape)}, got {tuple(predictions.shape)}"
        )


def _check_finite(name: str, values: Tensor) -> None:
    if count := int((~values.isfinite()).sum()):
        raise ValueError(f"{name} must be finite, got {count} values that are not")


def _one(value):
    """Return the value as a batch of one."""
    return torch.as_tensor(np.asarray(value) if isinstance(value, list | tuple) else value)[None]


class Perplexity(_PackagedMetric):
    """exp of the mean negative log-likelihood (nats per token) of the labels, over all tokens of all batches.

    predictions: logits (B, N, V), as a model returns them. references: labels (B, N), -100 where one does not count.
    config_name "default": causal language models; logits at i are scored on the label at i + 1, as the models' own loss
    does. "aligned": masked and sequence-to-sequence models; logits at i are scored on the label at i.
    compute: {"perplexity", "loss", "num_tokens"}.

    Raises `ValueError` for other shapes, labels past the vocabulary, and when no label counts.
    """

    CONFIG_NAMES = ("default", "aligned")

    def _info(self):
        return _info(
            "Perplexity of a language model.",
            "predictions: logits (B, N, V); references: labels (B, N), -100 is ignored.",
            # Per row: summed negative log-likelihood, number of tokens.
            {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")},
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add the logits (B, N, V) and labels (B, N) of one batch."""
        logits = _tensor("predictions", predictions, (3,), "(B, N, V)")
        labels = _tensor("references", references, (2,), "(B, N)").to(logits.device, torch.long)
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"references must have shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
        if (labels >= logits.shape[-1]).any() or ((labels < 0) & (labels != -100)).any():
            raise ValueError(
                f"references must be -100 or token ids below V={logits.shape[-1]}, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        if self.config_name == "default":
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = [float(label_loss(row, label, 1)) for row, label in zip(logits, labels, strict=True)]
        super().add_batch(predictions=losses, references=(labels != -100).sum(-1).tolist(), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add the logits (N, V) and labels (N,) of one row."""
        self.add_batch(predictions=_one(prediction), references=_one(reference), **kwargs)

    def _compute(self, predictions, references):
        tokens = int(np.sum(references))
        if tokens == 0:
            raise ValueError("references hold no label that counts: all are -100")
        loss = math.fsum(predictions) / tokens
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss, "num_tokens": tokens}


class AttentionFidelity(_PackagedMetric):
    """Distance between a student's attention and its teacher's.

    predictions: the student's, references: the teacher's, of one shape. config_name "default": outputs (B, ..., N, d)
    of attention modules, the vectors in the last axis. "maps": attention weights (B, ..., N, M), whose rows sum to 1.
    compute: "cosine", mean over vectors; "relative_error", √(Σ‖student - teacher‖² / Σ‖teacher‖²) over everything;
    for maps also "kl", mean over queries of KL(teacher ‖ student) in nats, as the conversion report measures it.
    Queries that are padding are left out by `add_batch(..., mask=attention_mask)`, (B, N) with true for those to keep;
    the keyword does not pass through `evaluate.combine`.

    Raises `ValueError` for unequal shapes, values that are not finite, maps whose rows do not sum to 1 (within 1e-2,
    what half precision leaves), and when no query is kept or the teacher's are all zero.
    """

    CONFIG_NAMES = ("default", "maps")

    def _info(self):
        return _info(
            "Agreement of a converted model's attention with its teacher's.",
            "predictions: the student's outputs (B, ..., N, d) or maps (B, ..., N, M); references: the teacher's.",
            # Per item: sums of cosine, ‖student - teacher‖², ‖teacher‖², KL; number of queries.
            {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")},
        )

    def add_batch(self, *, predictions=None, references=None, mask=None, **kwargs):
        """Add outputs (B, ..., N, d) or maps (B, ..., N, M) of student and teacher; mask (B, N), true = keep."""
        shapes = "(B, ..., N, d)"
        student = _tensor("predictions", predictions, (3, 4, 5), shapes)
        teacher = _tensor("references", references, (3, 4, 5), shapes).to(student.device)
        _check_shapes(student, teacher)
        keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if mask is not None:
            mask = _tensor("mask", mask, (2,), "(B, N)").to(student.device).bool()
            if mask.shape != (student.shape[0], student.shape[-2]):
                raise ValueError(
                    f"mask must have shape {(student.shape[0], student.shape[-2])} (B, N), got {tuple(mask.shape)}"
                )
            keep = keep & mask.view(mask.shape[0], *[1] * (student.dim() - 3), mask.shape[1])
        sums, counts = [], []
        for student_item, teacher_item, kept_queries in zip(student, teacher, keep, strict=True):
            student_item, teacher_item = student_item[kept_queries].double(), teacher_item[kept_queries].double()
            for name, values in (("predictions", student_item), ("references", teacher_item)):
                _check_finite(name, values)
            sums.append(self._sums(student_item, teacher_item))
            counts.append(len(student_item))
        super().add_batch(predictions=sums, references=counts, **kwargs)

    def _sums(self, student: Tensor, teacher: Tensor) -> list[float]:
        """Return the sums over the vectors (n, d) of one item."""
        divergence = 0.0
        if self.config_name == "maps":
            for name, weights in (("predictions", student), ("references", teacher)):
                if len(weights) and (weights.min() < 0 or (weights.sum(-1) - 1).abs().max() > 1e-2):
                    raise ValueError(
                        f"{name} must be attention weights: not negative, rows of sum 1; got rows of sum "
                        f"{float(weights.sum(-1).min()):.3g} to {float(weights.sum(-1).max()):.3g}"
                    )
            # The smallest normal float32, so that weights a float32 softmax rounds to 0 cost a finite amount.
            smallest = torch.finfo(torch.float32).tiny
            terms = teacher * (teacher.clamp_min(smallest).log() - student.clamp_min(smallest).log())
            divergence = float(terms.sum())
        cosine = F.cosine_similarity(student, teacher, dim=-1, eps=1e-30).sum()
        error = (student - teacher).square().sum()
        return [float(cosine), float(error), float(teacher.square().sum()), divergence]

    def add(self, *, prediction=None, reference=None, mask=None, **kwargs):
        """Add the outputs (..., N, d) or maps (..., N, M) of one item; mask (N,), true = keep."""
        mask = None if mask is None else _one(mask)
        self.add_batch(predictions=_one(prediction), references=_one(reference), mask=mask, **kwargs)

    def _compute(self, predictions, references):
        count = int(np.sum(references))
        cosine, error, size, divergence = (math.fsum(column) for column in zip(*predictions, strict=True))
        if count == 0 or size == 0:
            raise ValueError("references hold nothing to compare with: " + ("all masked" if count == 0 else "all zero"))
        scores = {"cosine": cosine / count, "relative_error": math.sqrt(error / size)}
        if self.config_name == "maps":
            scores["kl"] = divergence / count
        return scores


class Retrieval(_PackagedMetric):
    """Rank of each query's own passage among all passages added, by dot product (cosine, for unit vectors).

    predictions: embeddings of the queries (B, d); references: embeddings of their passages (B, d), row i for row i.
    compute: "mrr", mean of 1/rank, and "retrieval_at_k" for each k of `at`, share of ranks <= k. A passage as close as
    the query's own counts as ahead of it, so equal embeddings for everything get the worst score.

    Raises `ValueError` for other shapes, values that are not finite, k < 1, and fewer than 2 pairs.
    """

    def __init__(self, config_name: str | None = None, *, at: Sequence[int] = (1, 5, 10), **options):
        at = tuple(at)
        if not at or not all(isinstance(k, int) and k >= 1 for k in at):
            raise ValueError(f"at must hold integers >= 1, got {at!r}")
        self.at = at
        super().__init__(config_name, **options)

    def _info(self):
        vector = datasets.Sequence(datasets.Value("float32"))
        return _info(
            "Retrieval of each query's own passage by embeddings.",
            "predictions: query embeddings (B, d); references: passage embeddings (B, d).",
            {"predictions": vector, "references": vector},
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add embeddings of queries (B, d) and of their passages (B, d)."""
        queries = _tensor("predictions", predictions, (2,), "(B, d)").float()
        passages = _tensor("references", references, (2,), "(B, d)").float()
        _check_shapes(queries, passages)
        for name, values in (("predictions", queries), ("references", passages)):
            _check_finite(name, values)
        super().add_batch(predictions=queries.cpu().numpy(), references=passages.cpu().numpy(), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add the embeddings (d,) of one query and of its passage."""
        self.add_batch(predictions=_one(prediction), references=_one(reference), **kwargs)

    def _compute(self, predictions, references):
        if len(predictions) < 2:
            raise ValueError(f"predictions must hold at least 2 queries, got {len(predictions)}")
        if len({len(row) for row in predictions}) > 1:
            raise ValueError(f"predictions must be of one size d, got {sorted({len(row) for row in predictions})}")
        queries, passages = torch.tensor(predictions), torch.tensor(references)
        ranks = torch.cat([retrieval_ranks(part, passages, start) for start, part in _parts(queries)]).double()
        scores = {f"retrieval_at_{k}": float((ranks <= k).double().mean()) for k in self.at}
        return {"mrr": float((1 / ranks).mean()), **scores}


def _parts(queries: Tensor, size: int = 1024):
    return ((start, queries[start : start + size]) for start in range(0, len(queries), size))
