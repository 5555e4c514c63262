"""`convert` and `revert`: a pretrained model -> the same model with distance attention, and back."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.attention_spec import BLOCK_VERSION, AttentionSpec
from ..core.configuration_distattn import config_class_for
from ..core.discovery import find_attention_modules, locate, max_positions, select_modules
from ..core.interface import IMPLEMENTATIONS
from ..core.metrics import get_metric
from ..core.modeling_converted import DistAttnModelMixin, model_class_for
from ..core.nystrom_heads import SHORT_TEXT
from ..core.parameters import check_backend
from ..data.batches import MAX_LENGTH, MAX_TOKENS, calibration_batch, real_tokens
from ..data.config import parse_specs, with_fields
from ..functional.landmarks import STRATEGIES
from ..storage.companions import Source, describe_source
from ..storage.models import check_weights, rebuild
from .calibrate import CalibrationOptions, calibrate, fitted_defaults
from .calibrate_nystrom import far_field_warnings
from .observe import caught_shares
from .quantised_copy import is_quantised, quantised_copy
from .report_of_model import current_report as current_report
from .report_of_model import report_of

logger = logging.getLogger(__name__)

INITS = ("exact", "calibrated", "plain")
# Tokens of calibration text below which a fit is worth a warning.
_LITTLE_TEXT = 1024


def convert(
    model: PreTrainedModel,
    spec: AttentionSpec | str | Sequence[AttentionSpec | str],
    *,
    init: str | None = None,
    calibration=None,
    tokenizer=None,
    layers=None,
    options: CalibrationOptions | None = None,
    **spec_fields,
) -> PreTrainedModel:
    """Return a converted copy of a pretrained model; the model itself is not touched and shares nothing with the copy.

    Args:
        model: any `PreTrainedModel` whose attention goes through transformers' attention interface.
        spec: what replaces dot-product attention; several specs with different `layers`/`heads` make one plan. A name
            ("l2", "nystrom", "retrieval") stands for the spec of that metric or mechanism.
        init: "calibrated" fits λ, α, shift (and maps) per head to the teacher's attention on `calibration`;
            "exact" (sqeuclidean only) lifts the keys to a sphere, which loses nothing;
            "plain" only sets λ to the metric's default (the control: expect a large loss).
            None: "calibrated"; "exact" where no spec has anything to fit (retrieval with the teacher's own logits).
        calibration: strings, a `datasets.Dataset`, or tokenised batches; used by "calibrated" only.
        tokenizer: needed when `calibration` is text.
        layers: shorthand for `AttentionSpec(layers=...)` on every spec that names none.
        options: `CalibrationOptions`; None for the defaults.
        spec_fields: fields of `AttentionSpec` beside a name as spec: `convert(model, "retrieval", min_weight=0.01)`.

    Returns:
        The converted model, a `DistAttn<...>` class, in the mode (train or eval) the model is in, with a
        `ConversionReport` in `model.conversion_report`.

    Raises:
        ValueError: before anything is built, naming the field or the module: unknown metric, p < 1, λ <= 0, a layer or
            head out of range, an empty selection, a model without interface attention, NaN weights, no calibration.
    """
    spec = with_fields(spec, spec_fields, "convert", signature(convert).parameters)
    # Fitting needs gradients, which inference mode would forbid for good on every tensor made under it.
    with torch.inference_mode(False):
        return _convert(model, spec, init, calibration, tokenizer, layers, options or CalibrationOptions())


def _convert(model, spec, init, calibration, tokenizer, layers, options) -> PreTrainedModel:
    start = time.perf_counter()
    specs = parse_specs(spec)
    specs = [_with_beyond(spec, options) for spec in specs]
    if options.chooses_heads and not any(s.mechanism == "nystrom" for s in specs):
        name = "beyond_share" if options.max_error is None else "max_error"
        name = "select" if options.select == "probe" else name
        raise ValueError(f"{name}={getattr(options, name)!r} is for mechanism='nystrom', which no spec has")
    if init in (None, "calibrated"):
        init = "exact" if all(_fits_nothing(spec) for spec in specs) else "calibrated"
    specs = _check_arguments(model, specs, init, layers)
    modules = select_modules(find_attention_modules(model), specs)
    _check_modules(model, modules, specs)
    batch = None
    retrieves = any(spec.mechanism == "retrieval" for spec in specs)
    if init == "calibrated" or (retrieves and calibration is not None):
        longer = 2 if any(spec.mechanism == "nystrom" for spec in specs) else 1
        batch = calibration_batch(
            model,
            calibration,
            tokenizer,
            max_length=options.max_length or longer * MAX_LENGTH,
            max_tokens=options.max_tokens or longer * MAX_TOKENS,
            seed=options.seed,
        )
    warnings = _warnings(model, specs)
    if batch is None and calibration is not None:
        warnings.append(f"init={init!r} fits nothing: calibration is not used")
    tokens = real_tokens(batch) if batch else 0
    if init == "calibrated" and 0 < tokens < _LITTLE_TEXT:
        warnings.append(f"calibration: {tokens} tokens are little to fit on; {MAX_TOKENS:,} are used where there are")

    student = _build_student(model, specs, modules, init)
    if init == "calibrated":
        warnings += far_field_warnings(student, batch)
    for text in warnings:
        logger.warning(text)

    divergences = {}
    if batch is not None:
        # Without dropout, whatever mode the model came in.
        student.eval()
        divergences = calibrate(student, batch, options) if init == "calibrated" else {}
        retrieves = any(state.is_retrieval for state in student.attention_states.values())
        for name, shares in (caught_shares(student, batch) if retrieves else {}).items():
            measured = divergences.setdefault(name, [{} for _ in shares])
            for entry, share in zip(measured, shares):
                entry.update({} if share is None else {"caught": share})
        student.train(model.training)
    report = report_of(type(model), student, modules, divergences, init, warnings)
    if not report.groups:
        raise ValueError(
            f"max_error={options.max_error!r}: no head's outputs came so near to the teacher's, nothing would be "
            "converted; allow more, or use more landmarks or a larger window"
        )
    report.calibration_tokens = tokens
    report.base_model = _hub_name(model)
    if Path(name := str(model.config.name_or_path or "-")).is_dir():
        report.source = describe_source(Source(name))
    report.seconds = round(time.perf_counter() - start, 2)
    student.conversion_report = report
    student.converted_from = model.config.name_or_path
    return student


def describe_fit(specs: Sequence[AttentionSpec], options: CalibrationOptions, reads_text: bool = True) -> str:
    """Say in plain words what a calibrated conversion fits, on how much text, and about how long that takes."""
    if all(_fits_nothing(spec) for spec in specs):
        return "this attention has nothing to fit: what text is given only measures it"
    is_long = any(spec.mechanism == "nystrom" or fitted_defaults(spec).transform == "maps" for spec in specs)
    longer = 2 if any(spec.mechanism == "nystrom" for spec in specs) else 1
    data = f"at most {options.max_tokens or longer * MAX_TOKENS:,} tokens" if reads_text else "the data"
    steps = options.steps if options.steps is not None else 200 if is_long else 100
    return (
        f"each layer's new attention is fitted to the model's own, in {steps} steps on {data} (40 steps took 3 to 11 "
        "minutes for 135M parameters on two busy cores)"
    )


def _hub_name(model) -> str | None:
    """Return the name a model was loaded by, unless that is a folder, which means nothing on another machine."""
    name = str(model.config.name_or_path or "")
    return (
        name if name and name.count("/") <= 1 and not name.startswith((".", "~")) and not Path(name).exists() else None
    )


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Rebuild the original model: its class, its config, bit-identical pretrained weights, dot-product attention.

    Weights changed by fine-tuning after the conversion stay changed. Raises `ValueError` for a model that was not
    converted, or whose queries `fold_alpha` has scaled.
    """
    if not isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model; revert takes what convert returned")
    _refuse_adapters(model)
    check_weights(model, "reverting it")
    if model.config.distattn.get("queries_scaled"):
        raise ValueError(
            f"{type(model).__name__} has its α in the query projections (fold_alpha): its query projections are not "
            "the teacher's, whose attention they would not give; load the teacher itself"
        )
    base = model.base_class
    data = model.config.to_dict()
    for key in ("distattn", "auto_map", "model_type", "architectures"):
        data.pop(key, None)
    fallback = model.config.distattn["fallback"]
    config = base.config_class.from_dict(data)
    config._attn_implementation = fallback
    config.name_or_path = model.converted_from or model.config.name_or_path
    state = {name: tensor for name, tensor in model.state_dict().items() if ".distattn." not in f".{name}"}
    return _like(rebuild(base, config, state), model)


def _refuse_adapters(model) -> None:
    inside = any(hasattr(module, "base_layer") for module in model.modules())
    if inside or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} holds PEFT adapters; merge them first (PeftModel.merge_and_unload) or delete them"
        )


def _check_arguments(model, specs: list[AttentionSpec], init: str, layers) -> list[AttentionSpec]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}{_inside(model)}")
    if isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is converted already; call distattn_hf.revert(model) first")
    _refuse_adapters(model)
    check_weights(model, "converting it", quantised=is_quantised(model))
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    checked = []
    for spec in specs:
        metric = get_metric(spec.metric)
        metric.validate(spec.p)
        check_backend(spec)
        spec = replace(spec, metric=metric.name)
        if layers is not None and spec.layers is None:
            spec = replace(spec, layers=layers)
        if spec.mechanism == "nystrom" and spec.exact_below is None:
            spec = replace(spec, exact_below=_exact_below(model.config))
        checked.append(prepared(spec, init))
    return checked


def _inside(model) -> str:
    """Describe, in words and code, the model to convert inside a wrapper such as a SentenceTransformer."""
    if hasattr(model, "merge_and_unload"):
        return "; convert model.merge_and_unload(), and train adapters on the converted model"
    name = next((n for n in ("_orig_mod", "module") if isinstance(getattr(model, n, None), PreTrainedModel)), None)
    if name:
        return f"; convert model.{name}, and wrap the converted model"
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            attribute = "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
            return f", which holds one: convert that alone, {attribute} = convert({attribute}, ...)"
    return ""


def _with_beyond(spec: AttentionSpec, options: CalibrationOptions) -> AttentionSpec:
    """Return the spec with the `beyond` of those heads that the options choose, if they choose any."""
    if spec.beyond == "retrieval" and not options.chooses_heads:
        raise ValueError(
            "beyond='retrieval' needs CalibrationOptions(max_error=...), beyond_share or select='probe', which say of "
            "which heads"
        )
    is_open = spec.mechanism == "nystrom" and spec.beyond is None and options.chooses_heads
    return replace(spec, beyond="retrieval") if is_open else spec


def _exact_below(config) -> int:
    """Return the number of keys up to which Nyström queries attend exactly unless a spec sets it."""
    longest = max_positions(config.get_text_config(decoder=config.is_encoder_decoder))
    # Where no text is longer, nothing would be left of the conversion.
    return SHORT_TEXT if longest is not None and longest > SHORT_TEXT else 0


def _fits_nothing(spec: AttentionSpec) -> bool:
    return spec.mechanism == "retrieval" and spec.lift


def prepared(spec: AttentionSpec, init: str) -> AttentionSpec:
    """Return the spec with the settings that its initialisation implies."""
    if _fits_nothing(spec):
        return spec
    if spec.mechanism == "nystrom":
        if init != "calibrated":
            raise ValueError(f"mechanism='nystrom' needs init='calibrated' (landmarks come from text), got {init!r}")
        STRATEGIES.canonical(spec.landmarks)
        return spec if spec.transform is not None else replace(spec, transform="scalar")
    if spec.softening == "fit" and init != "calibrated":
        raise ValueError(f"softening='fit' needs init='calibrated' (ε comes from text), got {init!r}; give a number")
    if init == "exact":
        if spec.metric != "sqeuclidean":
            raise ValueError(
                f"init='exact' needs metric 'sqeuclidean' (no other distance equals dot-product attention), got "
                f"{spec.metric!r}; use init='calibrated'"
            )
        if spec.lam not in (None, 0.5) or spec.transform not in (None, "none"):
            raise ValueError(
                f"init='exact' sets lam=0.5 and transform='none', got lam={spec.lam!r}, transform={spec.transform!r}"
            )
        return replace(spec, lift=True, lam=0.5, learnable_lambda=False, transform="none")
    return fitted_defaults(spec) if init == "calibrated" else spec


def _check_modules(model, modules: dict, specs: list[AttentionSpec]) -> None:
    """Raise `ValueError`, before anything is built, for what would fail later."""
    for name, parameter in model.named_parameters() if not is_quantised(model) else ():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"weight {name!r} of the checkpoint holds NaN or infinite values")
    for name in modules:
        module = locate(model, name)
        softcap = getattr(module, "attn_logit_softcapping", None)
        if modules[name].get("softcap") and any(
            specs[g["spec"]].mechanism == "nystrom" for g in modules[name]["groups"]
        ):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) has attn_logit_softcapping={softcap:g}: mechanism='nystrom' sums "
                "exponentials of logits, which it cannot cap one by one. Leave this layer out (layers=...); exact "
                "metrics take it"
            )


def _warnings(model, specs) -> list[str]:
    rope = any("rotary" in type(m).__name__.lower() for m in model.modules())
    names = sorted({s.metric for s in specs if not get_metric(s.metric).rotation_invariant})
    if rope and names:
        return [
            f"{', '.join(names)}: this model rotates query and key (RoPE); the metric is not invariant under rotation, "
            "so its attention depends on absolute positions too"
        ]
    return []


def _build_student(model, specs, modules, init) -> PreTrainedModel:
    student_class = model_class_for(type(model))
    data = model.config.to_dict()
    for key in ("model_type", "auto_map", "architectures"):
        data.pop(key, None)
    if (data.get("quantization_config") or {}).get("quant_method") == "gguf":
        # Read from GGUF, the weights are plain floats already; the mark alone would forbid saving them.
        data.pop("quantization_config")
    block = {
        "version": BLOCK_VERSION,
        "specs": [spec.to_dict() for spec in specs],
        "modules": copy.deepcopy(modules),
        "fallback": "eager" if model.config._attn_implementation == "eager" else "sdpa",
        "init": init,
    }
    config = config_class_for(type(model.config)).from_dict({**data, "distattn": block})
    # The teacher's name is not the student's: PEFT would put an adapter of the student on the teacher.
    config.name_or_path = ""
    config.dtype = model.dtype
    if is_quantised(model):
        return quantised_copy(model, student_class, config)
    # The head parameters at their start values, under the names they will have.
    with torch.device("cpu"):
        state = dict(model.state_dict())
        state.update(_initial_head_parameters(model, config))
    try:
        return _like(rebuild(student_class, config, state), model)
    except KeyError as error:
        if error.args and error.args[0] in IMPLEMENTATIONS:
            raise ValueError(
                f"{type(model).__name__} cannot be converted: a part of it picks its attention class by the "
                "implementation's name instead of following transformers' attention interface"
            ) from error
        raise


def _initial_head_parameters(model, config) -> dict[str, Tensor]:
    from ..core.modeling_converted import _own_scaling
    from ..core.parameters import DistanceAttentionState

    specs = config.attention_specs
    names = {module: name for name, module in model.named_modules()}
    values = {}
    for name, entry in config.distattn["modules"].items():
        module = locate(model, name)
        state = DistanceAttentionState(specs, entry)
        for group in state.groups:
            group.reset_parameters(_own_scaling(module))
        values.update({f"{names[module]}.distattn.{k}": v for k, v in state.state_dict().items()})
    return values


def _like(new: PreTrainedModel, old: PreTrainedModel) -> PreTrainedModel:
    """Give `new` what `old` has beside its weights: buffers, device, dtypes, mode, flags, generation config."""
    buffers = dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
    old_parameters = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in old_parameters:
            parameter.requires_grad_(old_parameters[name].requires_grad)
            if parameter.dtype != old_parameters[name].dtype:
                # Loading applies one dtype and the class's exceptions; the model may have been cast otherwise since.
                parameter.data = old_parameters[name].detach().clone()
    if old.is_activation_checkpointing:
        new.activation_checkpointing_enable()
    if old.can_generate():
        new.generation_config = copy.deepcopy(old.generation_config)
    return new.to(old.device).train(old.training)
