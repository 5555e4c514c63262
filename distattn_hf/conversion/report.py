"""The report of a conversion, by layer and head: printable, and JSON beside the checkpoint."""

import copy
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, median

from ..core.attention_spec import OPTIONS, AttentionSpec
from ..core.parameters import spec_of_group

# What calibration measures of a group of heads under these names, beside divergences.
MEASURED = (
    "softening_ratio",
    "window_error",
    "output_error",
    "rows_off",
    "sink_weight",
    "teacher_sink_weight",
    "caught",
    "probe_rise",
)
# Columns of the table: title, width, and the field that has their values.
_COLUMNS = (
    ("λ", 9, "lam"), ("α", 7, "alpha"), ("KL before", 10, "divergence_before"), ("KL after", 10, "divergence_after"),
    ("window off", 10, "window_error"), ("off", 10, "output_error"), ("ε", 9, "softening"),
    ("ε/median", 9, "softening_ratio"), ("KL plain", 10, "divergence_plain"), ("caught", 9, "caught"),
    ("probe", 9, "probe_rise"), ("sink", 9, "sink_weight"), ("teacher", 9, "teacher_sink_weight"),
    ("shift", 9, "logit_shift"),
)  # fmt: skip


@dataclass
class GroupReport:
    """One group of heads; divergence_* are KL(teacher's weights ‖ student's) in nats per query, None if not measured.

    Softened distances: softening is ε, softening_ratio ε over the median of the head's plain distances (of cosine: of
    its norms), divergence_plain the divergence of the plain distance.

    Learned sinks: sink_weight is the share of a row's weight that the sink takes, teacher_sink_weight the teacher's.
    Where logits count (sinks, caps): logit_shift is the logit of the head's origin, from which its distances count.

    Retrieval attention: caught is the share of exact attention's weight on the keys that queries read, on the text.

    Chosen by a probe: probe_rise is what the log-loss of key-value texts rises by where the far keys of the head's key
    head are hidden from the teacher, in nats.

    Nyström attention: window_error and output_error are relative errors of the
    outputs, of sinks and window alone and as fitted; rows_off is the share of rows whose softmax denominator is 25% or
    more off.

    exact: whether these heads were the teacher's by construction as they were converted, up to rounding: the lift, or
    a dot product at the teacher's own scale. Training since then is not known here.

    measured_with: the options that need no fit (`OPTIONS`) as they were set when `caught` and these were measured; None
    if nothing was measured, or in reports from before they were recorded.
    """

    module: str
    layer: int | None
    kind: str
    metric: str
    heads: list[int]
    lam: list[float]
    alpha: list[float] | None = None
    divergence_before: list[float] | None = None
    divergence_after: list[float] | None = None
    window_error: list[float] | None = None
    output_error: list[float] | None = None
    rows_off: list[float] | None = None
    softening: list[float] | None = None
    softening_ratio: list[float] | None = None
    divergence_plain: list[float] | None = None
    sink_weight: list[float] | None = None
    teacher_sink_weight: list[float] | None = None
    logit_shift: list[float] | None = None
    mechanism: str = "distance"
    caught: list[float] | None = None
    probe_rise: list[float] | None = None
    measured_with: dict | None = None
    exact: bool | None = None

    def __post_init__(self):
        if self.exact is None:  # A report from before it was recorded.
            self.exact = self.mechanism == "distance" and self.metric == "lifted_sqeuclidean"

    @property
    def attention(self) -> str:
        """What took the place of dot-product attention: the metric's name, "nystrom", "retrieval" or "retrieval l2"."""
        if self.mechanism == "retrieval":
            return "retrieval" if self.metric == "lifted_sqeuclidean" else f"retrieval {self.metric}"
        return "nystrom" if self.output_error else self.metric


def settings_of(spec: AttentionSpec) -> dict:
    """Return those options of a spec that change what its heads read, and need no fit."""
    return {name: getattr(spec, name) for name in OPTIONS if name != "backend" and spec.has_option(name)}


def _fields_of(kind: type, data: dict) -> dict:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


@dataclass
class ConversionReport:
    """The record of one `convert`. `before` is the metric's default λ without a fit, `after` the fitted parameters.

    unconverted names the attention modules left as they were; exact_heads the heads of the others that keep dot-product
    attention, by module. base_model is the teacher's name as it was loaded, if that is no folder; source what is known
    of where it was loaded from (`describe_source`: its name, its licence). changed_since: λ, α or ε are no longer those
    of the fit, from which the KL values and ε/median are. options_changed: what heads read (window_size, num_blocks)
    is set otherwise than when `caught` and the errors of outputs were measured. cache_bytes, of models that read on
    from a cache: what 1,000 more tokens of a text take in all self-attention ("growing"), and in the teacher's
    ("teacher"), and what does not depend on the length ("constant"), once a text is longer than `exact_below`.
    """

    base_architecture: str
    init: str
    groups: list[GroupReport] = field(default_factory=list)
    unconverted: list[str] = field(default_factory=list)
    exact_heads: dict[str, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    calibration_tokens: int = 0
    seconds: float = 0.0
    base_model: str | None = None
    changed_since: bool = False
    options_changed: bool = False
    source: dict | None = None
    cache_bytes: dict[str, int] | None = None

    @property
    def mean_alpha(self) -> float | None:
        """α over all heads that have one (cosine has none): 1 is fully Euclidean, towards 0 it becomes the teacher."""
        values = [a for g in self.groups if g.alpha for a in g.alpha]
        return fmean(values) if values else None

    def _mean(self, name: str) -> float | None:
        values = [v for g in self.groups if getattr(g, name) for v in getattr(g, name)]
        return fmean(values) if values else None

    @property
    def mean_divergence_before(self) -> float | None:
        """Nats per query, mean over heads, at the metric's default λ."""
        return self._mean("divergence_before")

    @property
    def mean_divergence_after(self) -> float | None:
        """Nats per query, mean over heads, after the fit."""
        return self._mean("divergence_after")

    @property
    def mean_caught(self) -> float | None:
        """The share of exact attention's weight on the keys that are read, mean over heads that retrieve."""
        return self._mean("caught")

    @property
    def softening_ratios(self) -> list[float]:
        """ε of every softened head, in medians of its plain distances: towards 0 it is the plain distance."""
        return [value for group in self.groups if group.softening for value in group.softening_ratio or ()]

    @property
    def median_softening_ratio(self) -> float | None:
        """The median of `softening_ratios`; None without softened heads."""
        return median(self.softening_ratios) if self.softening_ratios else None

    # Models held the dict of `to_dict` before: it is read as that.
    def __getitem__(self, name: str):
        """Return an entry of `to_dict`."""
        return self.to_dict()[name]

    def keys(self):
        """Return the names of the entries of `to_dict`."""
        return self.to_dict().keys()

    def __iter__(self):
        return iter(self.to_dict())

    def __contains__(self, name) -> bool:
        return name in self.to_dict()

    def get(self, name: str, default=None):
        """Return an entry of `to_dict`, or `default`."""
        return self.to_dict().get(name, default)

    def items(self):
        """Return the entries of `to_dict`."""
        return self.to_dict().items()

    @property
    def heads_by_loss(self) -> dict[str, int]:
        """Heads that are "exact" by construction, "unread" (what they retrieve was not measured), "unfitted": how many.

        A head can be both of the last two: of a metric that was not fitted, and of which few keys are read.
        """
        heads = dict.fromkeys(("exact", "unread", "unfitted"), 0)
        for group in self.groups:
            retrieves = group.mechanism == "retrieval"
            if group.exact:
                heads["exact"] += len(group.heads)
                continue
            if retrieves and group.caught is None:
                heads["unread"] += len(group.heads)
            has_own_logits = not (retrieves and group.metric == "lifted_sqeuclidean")
            if has_own_logits and group.divergence_after is None and group.output_error is None:
                heads["unfitted"] += len(group.heads)
        return heads

    @property
    def loss(self) -> list[str]:
        """What is known of the loss, in sentences: none by construction, or not measured, of how many heads; and how to
        measure it. Of heads that were measured the numbers speak."""
        heads, lines = self.heads_by_loss, []
        if heads["exact"]:
            lines.append(
                f"none by construction in {heads['exact']} heads as they were converted, equal to the teacher's up to "
                "rounding (training since then is not recorded here)"
            )
        if heads["unread"]:
            lines.append(
                f"not measured without text in {heads['unread']} heads that retrieve; give calibration (on the "
                "command line --calibration) to measure the share of the attention that they catch"
            )
        if heads["unfitted"]:
            lines.append(f"not measured in {heads['unfitted']} heads, to which nothing was fitted: expect a large one")
        if heads["unread"] or heads["unfitted"]:
            lines[-1] += (
                "; what it costs is measured by distattn evaluate FOLDER --against TEACHER --data TEXT (of long texts: "
                "--task passkey)"
            )
        return lines

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict that `from_dict` turns back into an equal report."""
        return {**asdict(self), "mean_alpha": self.mean_alpha, "loss": self.loss}

    @classmethod
    def from_dict(cls, data: dict, block: dict | None = None) -> "ConversionReport":
        """Return the report that `to_dict` described; entries that are no fields are left out.

        block: the `distattn` block of the model's config, which says what is set now, for `options_changed`.

        Raises `ValueError` for what is no report.
        """
        data = copy.deepcopy(data.to_dict() if isinstance(data, ConversionReport) else dict(data))
        if missing := [name for name in ("base_architecture", "init", "groups") if name not in data]:
            raise ValueError(
                f"a conversion report must have {', '.join(missing)}, got only {', '.join(data) or 'nothing'}"
            )
        data["groups"] = [GroupReport(**_fields_of(GroupReport, group)) for group in data["groups"]]
        report = cls(**_fields_of(cls, data))
        # A block without modules belongs to a model made from its config, of which nothing was measured.
        if block is not None and block.get("modules"):
            report.options_changed = report._measured_otherwise(block)
        return report

    def _measured_otherwise(self, block: dict) -> bool:
        specs = [AttentionSpec.from_dict(spec) for spec in block["specs"]]
        now = {}
        for module, entry in block["modules"].items():
            for group in entry["groups"]:
                heads = range(entry["num_heads"]) if group["heads"] is None else group["heads"]
                now[module, tuple(heads)] = settings_of(spec_of_group(specs, group))
        return any(g.measured_with not in (None, now.get((g.module, tuple(g.heads)))) for g in self.groups)

    def table(self, per_head: bool = False) -> str:
        """Return a table for a terminal: a line per group of heads, or per head, with what is known of any.

        Modules one after another whose lines would be equal, as where nothing was measured, share one.
        """
        columns = [column for column in _COLUMNS if any(_values(part, column[2]) for part in self.groups)]
        rows: list[tuple[list[str], tuple[str, ...]]] = []
        for part in self.groups:
            is_measured = any(_values(part, name) for _, _, name in columns if name != "lam") or len(set(part.lam)) > 1
            each = per_head and is_measured
            for pick in [[i] for i in range(len(part.heads))] if each else [range(len(part.heads))]:
                label = str(part.heads[pick[0]]) if each else "all" if per_head else self._count(part)
                cells = part.attention, label, *(_cell(_values(part, name), pick) for _, _, name in columns)
                if rows and rows[-1][1] == cells:
                    rows[-1][0].append(part.module)
                else:
                    rows.append(([part.module], cells))
        lines = [f"{'module':<42} {'attention':<18} {'heads':>5}" + "".join(f" {t:>{w}}" for t, w, _ in columns)]
        for modules, (attention, label, *cells) in rows:
            more = f" and {len(modules) - 1} more like it" if len(modules) > 1 else ""
            name = modules[0][len(more) - 42 :] + more
            values = "".join(f" {cell:>{width}}" for cell, (_, width, _) in zip(cells, columns))
            lines.append(f"{name:<42} {attention[:18]:<18} {label:>5}{values}")
        for module, heads in self.exact_heads.items():
            lines.append(f"{module[-42:]:<42} {'dot':<18} {'heads ' + ', '.join(map(str, heads))}")
        lines += self._legend({name for _, _, name in columns})
        lines.append(self.summary())
        lines += [f"loss: {text}" for text in self.loss]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    def _legend(self, shown: set[str]) -> list[str]:
        """Return what the table's columns are, for those that have values."""
        lines = []
        if "lam" in shown:
            lines.append("λ: softmax(-λ·distance) in place of softmax(q·k)")
        if "alpha" in shown:
            lines.append("α: queries are divided, keys multiplied by it (1: the plain distance)")
        if self.mean_divergence_after is not None:
            lines.append(
                "KL: of the student's attention weights from the teacher's, in nats per query (0: equal); before: with "
                "the metric's default λ and no fit; after: as fitted"
            )
        if self.softening_ratios:
            lines.append(
                "ε: below it the distance is quadratic; ε/median: in medians of the head's plain distances, of cosine "
                "in medians of its norms (0: the plain distance), as fitted; KL plain: of the plain distance, with its "
                "own λ and α"
            )
        if self.mean_caught is not None:
            lines.append(
                "caught: share of exact attention's weight on the keys that are read, mean over the text's queries"
            )
        if self._mean("probe_rise") is not None:
            lines.append(
                "probe: what key-value texts cost the teacher more, in nats a token of an answer, where the far keys "
                "of the key head are hidden"
            )
        if self._mean("sink_weight") is not None:
            lines.append("sink: share of a row's weight that the learned sink takes; teacher: the same of the teacher")
        if self._mean("logit_shift") is not None:
            lines.append("shift: the logit of a head's origin, from which distances count for the sink or the cap")
        if self._mean("output_error") is not None:
            lines.append(
                "off: relative error of a head's outputs (0: equal); window off: the same of sinks and window alone, "
                "without landmarks"
            )
        if self.exact_heads:
            lines.append("dot: heads that keep dot-product attention")
        return lines

    def _count(self, group: GroupReport) -> str:
        """Return how many heads a group has; of how many, where some of the module keep dot-product attention."""
        exact = len(self.exact_heads.get(group.module, ()))
        total = exact + sum(len(g.heads) for g in self.groups if g.module == group.module)
        return str(total) if len(group.heads) == total else f"{len(group.heads)}/{total}"

    def summary(self) -> str:
        """Return one line: what was converted and what the fit left."""
        modules = len({group.module for group in self.groups})
        parts = [f"{self.base_architecture}: {modules} attention modules, init={self.init}"]
        if self.unconverted:
            parts.append(f"{len(self.unconverted)} left as they were")
        if retrieving := sum(len(group.heads) for group in self.groups if group.mechanism == "retrieval"):
            parts.append(f"{retrieving} heads retrieve")
        if self.exact_heads:
            parts.append(f"{sum(map(len, self.exact_heads.values()))} heads keep dot-product attention")
        if self.mean_alpha is not None:
            parts.append(f"mean α {self.mean_alpha:.3f}")
        note = " at the conversion (λ, α or ε have changed since)" if self.changed_since else ""
        if (ratio := self.median_softening_ratio) is not None:
            parts.append(f"ε/median {ratio:.2g} in the median head (0: the plain distance){note}")
        if self.mean_divergence_after is not None:
            before = "" if self.mean_divergence_before is None else f"{self.mean_divergence_before:.4f} -> "
            parts.append(f"KL {before}{self.mean_divergence_after:.4f} nats per query{note}")
        others = " at the conversion (with other options than those set now)" if self.options_changed else ""
        if (caught := self.mean_caught) is not None:
            parts.append(f"{caught:.2%} of the attention's weight caught{others}")
        if self.cache_bytes:
            growing, teacher, constant = (self.cache_bytes[name] for name in ("growing", "teacher", "constant"))
            parts.append(
                f"cache {growing:,} bytes per 1,000 tokens (the teacher's {teacher:,})"
                + (f" and {constant:,} at any length" if constant else "")
            )
        if (error := self._mean("output_error")) is not None:
            off = self._mean("rows_off")
            parts.append(
                f"outputs {error:.1%} off (sinks and window alone: {self._mean('window_error'):.1%})"
                + (f", softmax denominator 25% or more off in {off:.1%} of rows" if off is not None else "")
                + others
            )
        return ", ".join(parts)

    def __str__(self) -> str:
        return self.table()


def _values(part: GroupReport, name: str):
    """Return a field of a group; of the lift no λ, which is ½ by its formula and says nothing."""
    return None if name == "lam" and part.metric == "lifted_sqeuclidean" else getattr(part, name)


def _cell(values, pick) -> str:
    """Return the mean of the picked values, or a dash."""
    return "-" if values is None else f"{fmean(values[i] for i in pick):.4g}"
