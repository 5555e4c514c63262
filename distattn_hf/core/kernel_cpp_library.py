"""Compile the CPU kernels once per machine, load them, and pass tensors to them by ctypes."""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel_cpp_backward import BACKWARD
from .kernel_cpp_forward import DECODE, FORWARD
from .kernel_cpp_softened import SOFTENED
from .kernel_cpp_tiles import TILES

# Exact attention. Other libraries use TILES, too, and are compiled where they are used.
EXACT = "\n".join((TILES, SOFTENED, FORWARD, BACKWARD, DECODE))
# No -ffast-math: a NaN must stay one, and -inf masks. -O3: there GCC unrolls the register tiles (half the time of -O2).
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC", "-Wno-psabi", "-x", "c++"),
)
_COMPILERS, _SECONDS = ("g++", "c++", "clang++"), 300
# Rows of q, k and v are padded to this many floats.
ALIGNMENT = 16

# (metric, p) -> number of the metric in the C++ `switch`; lp takes the general entry unless its p has its own.
KINDS = {"l1": 0, "sqeuclidean": 1, "l2": 2, "lp": 4, "chebyshev": 5, "cosine": 6, "dot": 7}
_ORDERS = {1.0: 0, 2.0: 2, 3.0: 3}
# The softened forms (cosine's is a matter of norms); those of lp and chebyshev, p = inf, are one kind.
_SOFTENED = {0: 8, 2: 9, 3: 10, 4: 10, 5: 10, 6: 6}


def kind_of(metric: str, p: float | None, softened: bool = False) -> int | None:
    """Return the kernel's number for a metric, or None when there is no kernel."""
    kind = _ORDERS.get(p, KINDS["lp"]) if metric == "lp" else KINDS.get(metric)
    return _SOFTENED.get(kind) if softened else kind


def in_knees(kind: int) -> bool:
    """Return whether a softened kind takes 1/δ of each head, and λ·ε for λ: its distances are in units of ε."""
    return kind == _SOFTENED[KINDS["lp"]]


def compiler() -> list[str] | None:
    """Return the C++ compiler and its first arguments: $CXX, or the first of g++, c++, clang++ on the path."""
    commands = [shlex.split(os.environ.get("CXX", "")), *([name] for name in _COMPILERS)]
    return next(([path, *flags] for name, *flags in filter(None, commands) if (path := shutil.which(name))), None)


def _machine() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> Path:
    """Return the folder for compiled kernels; raises `RuntimeError` where there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distattn_hf"


def _build(source: str, anew: bool = False) -> Path:
    """Return the compiled library, from the cache or made now; raises `OSError` or `subprocess.SubprocessError`."""
    command = [*compiler(), *_FLAGS]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    digest = hashlib.sha256("\0".join([source, *command, version, _machine()]).encode()).hexdigest()[:20]
    name = f"kernels-{digest}.so"
    try:
        folder = _cache_folder()
        if not anew and (folder / name).exists():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    except (OSError, RuntimeError):
        # No cache folder: compile for this process alone.
        folder = Path(tempfile.mkdtemp(prefix="distattn_hf-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    library = folder / name
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-", "-o", temporary], input=source, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        # Atomic, for processes that compile at the same time.
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


@lru_cache
def _load(source: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Return (library, None), or (None, why there is none)."""
    if sys.platform != "linux":
        return None, f"the CPU kernels are built on Linux only, this is {sys.platform}"
    if compiler() is None:
        return None, f"no C++ compiler found ($CXX, {', '.join(_COMPILERS)})"
    try:
        library = _build(source)
        try:
            return ctypes.CDLL(str(library)), None
        except OSError:  # a damaged file in the cache
            return ctypes.CDLL(str(_build(source, anew=True))), None
    except (OSError, subprocess.SubprocessError) as error:
        compiler_output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = f"the C++ compiler {compiler()[0]} failed: {compiler_output[0] if compiler_output else error}"
    warnings.warn(f"distattn_hf runs without its CPU kernels, more slowly: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


@torch.compiler.assume_constant_result
def unavailable(source: str = EXACT) -> str | None:
    """Return why these CPU kernels cannot run here, or None; the first call compiles them (EXACT: 20 to 40 s)."""
    return _load(source)[1]


def transformed() -> bool:
    """Return whether torch.func or forward-mode derivatives are active: they see into operators, not a library."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def readable(*tensors: Tensor | None) -> bool:
    """Return whether a kernel may read these tensors' memory now: no fakes, subclasses or transforms."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def in_onnx_export() -> bool:
    """Return whether this is being written as ONNX; what says so takes a second to import, and is there then."""
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


def can_run(source: str, *tensors: Tensor) -> bool:
    """Return whether kernels without gradients can read these tensors: float32 on the CPU, no gradient asked for."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or 0 in t.shape for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return readable(*tensors) and unavailable(source) is None


_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p
kernel_listeners: list = []  # called after every kernel: (name, its structure, its numbers, its tensors)


def fields(pointers: str, numbers: str, strides: dict[str, int], reals: str) -> list[tuple[str, type]]:
    """Return the fields of a C structure: pointers, longs, arrays of longs and floats, in this order."""
    return [
        *((name, _POINTER) for name in pointers.split()),
        *((name, _LONG) for name in numbers.split()),
        *((name, _LONG * size) for name, size in strides.items()),
        *((name, ctypes.c_float) for name in reals.split()),
    ]


def run_kernel(source: str, name: str, data: ctypes.Structure, **tensors: Tensor | None) -> None:
    """Call a kernel of a library with a structure whose pointers are set to these tensors, which must stay alive."""
    for field, tensor in tensors.items():
        setattr(data, field, None if tensor is None else tensor.data_ptr())
    if _call(source, name, data, **tensors):
        raise MemoryError(f"the CPU kernel {name} got no memory for its work")


def _call(source: str, name: str, data: ctypes.Structure, *numbers: int, **tensors: Tensor | None) -> int:
    failed = getattr(_load(source)[0], name)(ctypes.byref(data), *numbers)
    for listener in kernel_listeners:
        listener(name, data, numbers, tensors)
    return failed


def strides(tensor: Tensor) -> ctypes.Array:
    """Return the distances in memory of items, heads and rows of (B, H, N, x), in entries."""
    return (_LONG * 3)(*tensor.stride()[:3])


_NUMBERS = "B H G N M d dp dv_ vp causal splits threads"


class _Problem(ctypes.Structure):
    _fields_ = fields(
        "q k q_norms k_norms kpanels v vpanels coef soft bias sink shift out lse dout keep "
        "o l dq dk dv dcoef dbias dshift sums",
        _NUMBERS,
        {"keep_stride": 4, "bias_stride": 4},
        "p cap",
    )


class _Decode(ctypes.Structure):
    _fields_ = fields(
        "q coef soft bias sink shift k v keep o partial",
        _NUMBERS + " value_groups",
        {"k_stride": 3, "v_stride": 3, "keep_stride": 4, "bias_stride": 4},
        "p cap",
    )


def padded_rows(tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous float32, its last axis filled with zeros up to a multiple of 16."""
    fill = -tensor.shape[-1] % ALIGNMENT
    return (F.pad(tensor.float(), (0, fill)) if fill else tensor.float()).contiguous()


# Whatever default device or dtype the caller has set (transformers builds models on the meta device), these are floats.
FLOATS = {"dtype": torch.float32, "device": "cpu"}


def _cut(tensor: Tensor, size: int) -> Tensor:
    """Return the first `size` entries of the last axis."""
    return tensor if tensor.shape[-1] == size else tensor[..., :size].contiguous()


def _numbers(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _sum_splits(tensor: Tensor) -> Tensor:
    return tensor[0] if len(tensor) == 1 else tensor.sum(0)


def _panels(tensor: Tensor) -> Tensor:
    """Reorder (B, H, M, d) to (B, H, ⌈M / width⌉, d, width), filled with zeros: the order the register tiles read."""
    width = _load(EXACT)[0].panel_width()
    batch, heads, length, size = tensor.shape
    if length % width:
        tensor = F.pad(tensor, (0, 0, 0, -length % width))
    return tensor.float().reshape(batch, heads, -1, width, size).transpose(-1, -2).contiguous()


class _Call:
    """A C structure with the arguments of a kernel; keeps the tensors alive that it points into."""

    def __init__(self, kind: type, query: Tensor, key: Tensor, value_dim: int, p: float | None):
        self.kept: list[Tensor] = []
        self.data = data = kind()
        data.B, data.H, data.N, data.d = query.shape
        data.M, data.dv_, data.G = key.shape[2], value_dim, query.shape[1] // key.shape[1]
        data.dp, data.vp = (size + -size % ALIGNMENT for size in (data.d, data.dv_))
        data.p = p or 0.0
        data.splits = 1
        # At least about 50 µs of work for each thread.
        work = query.numel() * data.M
        data.threads = max(1, min(torch.get_num_threads(), work >> 19))

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.kept.append(tensor)
                setattr(self.data, name, tensor.data_ptr())

    def norms(self, query: Tensor, key: Tensor, kind: int) -> None:
        """Set squared norms for softened l2, of keys with zeros up to a whole panel; `vecdot` would write products."""
        if kind == _SOFTENED[KINDS["l2"]]:
            query_norms, key_norms = (torch.linalg.vector_norm(t.float(), dim=-1).square() for t in (query, key))
            fill = -key.shape[2] % _load(EXACT)[0].panel_width()
            self.point(q_norms=query_norms.contiguous(), k_norms=F.pad(key_norms, (0, fill)).contiguous())

    def mask(self, keep: Tensor | None, bias: Tensor | None) -> None:
        """Set keep and bias; broadcast axes get stride 0, so that no (B, H, N, M) tensor is made."""
        shape = (self.data.B, self.data.H, self.data.N, self.data.M)
        for name, tensor in (("keep", keep), ("bias", bias)):
            if tensor is not None:
                tensor = (tensor.float() if name == "bias" else tensor).contiguous().expand(shape)
                self.point(**{name: tensor})
                setattr(self.data, f"{name}_stride", (_LONG * 4)(*tensor.stride()))

    def cap(self, cap: float, shift: Tensor | None) -> None:
        """Set the cap on logits, 0 for none, and what is added to logits inside it."""
        self.data.cap = cap
        self.point(shift=_numbers(shift))

    def run(self, name: str, *numbers: int) -> None:
        if _call(EXACT, name, self.data, *numbers):
            raise RuntimeError(f"no CPU kernel {name} for metric number {numbers[0]}")


def attention_forward(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal):
    """Return (output (B, H, N, d_v), log-sum-exp (B, H, N)) in float32; coef (H,) is λ·scaling.

    soft (H,): of the softened metric ε; of l1 δ = ε / d; of lp and chebyshev 1/δ (see `in_knees`). None: not softened.
    sink (B, H, N, 1): the logit of a key without a value, which both results count in, or None. cap > 0, or 0: logits
    without bias are cap·tanh((logit + shift) / cap), shift (B, H, N, 1).
    """
    call = _Call(_Problem, query, key, value.shape[-1], p)
    call.norms(query, key, kind)
    output = torch.empty(*query.shape[:3], call.data.vp, **FLOATS)
    lse = torch.empty(query.shape[:3], **FLOATS)
    call.point(q=padded_rows(query), kpanels=_panels(key), v=padded_rows(value), o=output, l=lse)
    call.point(coef=coef.float().contiguous(), soft=_numbers(soft), sink=_numbers(sink))
    call.mask(keep, bias)
    call.cap(cap, shift)
    call.data.causal = causal
    call.run("attention_forward", kind)
    return _cut(output, call.data.dv_), lse


def attention_backward(
    grad, query, key, value, coef, soft, keep, bias, shift, output, lse, kind, p, cap, causal, bias_grad
):
    """Return gradients (query, key, value, coef, bias, shift), float32, of the tensors' shapes; of bias an empty one
    without bias_grad, of shift without a cap.
    """
    call = _Call(_Problem, query, key, value.shape[-1], p)
    call.norms(query, key, kind)
    data = call.data
    units = data.B * key.shape[1]
    if bias_grad:
        # Work is divided so that no two threads add to the same entry of the bias.
        units //= 1 if bias.shape[0] == data.B else data.B
        units //= 1 if bias.shape[1] == data.H else key.shape[1]
    if units < 2 * data.threads and not (bias_grad and bias.shape[2] == 1):
        data.splits = -(-2 * data.threads // units)
    rows = {"q": padded_rows(query), "k": padded_rows(key)}
    new = {
        "dq": torch.empty_like(rows["q"]),
        "dk": torch.zeros(data.splits, *rows["k"].shape, **FLOATS),
        "dv": torch.zeros(data.splits, *value.shape[:3], data.vp, **FLOATS),
        "dcoef": torch.empty(data.splits, data.B, data.H, **FLOATS),
        "dshift": torch.zeros(query.shape[:3] if cap else 0, **FLOATS),
    }
    call.point(
        **rows, kpanels=_panels(key), vpanels=_panels(value), dout=padded_rows(grad), out=padded_rows(output), lse=lse
    )
    call.point(**new, coef=coef.float().contiguous(), soft=_numbers(soft))
    call.mask(keep, bias)
    call.cap(cap, shift)
    bias_gradient = torch.zeros(bias.shape if bias_grad else 0, **FLOATS)
    if bias_grad:
        call.point(dbias=bias_gradient)
    data.causal = causal
    call.run("attention_backward", kind)
    return (
        _cut(new["dq"], data.d),
        _cut(_sum_splits(new["dk"]), data.d),
        _cut(_sum_splits(new["dv"]), data.dv_),
        new["dcoef"].sum((0, 1)),
        bias_gradient,
        new["dshift"][..., None] if cap else new["dshift"],
    )


def attention_decode(query, key, value, coef, soft, keep, bias, sink, shift, kind, p, cap, causal) -> Tensor:
    """Return the output (B, H, N, d_v), float32, for few queries; reads float32 or bfloat16 keys once, in place.

    Key heads may share a value head: the value has as many heads as the key or a divisor of them.
    """
    call = _Call(_Decode, query, key, value.shape[-1], p)
    data = call.data
    data.value_groups = key.shape[1] // value.shape[1]
    if key.dtype not in (torch.float32, torch.bfloat16):
        key, value = key.float(), value.float()
    # One flag tells the kernel the dtype of both.
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    units = data.B * key.shape[1]
    if units < 4 * data.threads and data.threads > 1:
        data.splits = -(-4 * data.threads // units)
    output = torch.empty(data.B, data.H, data.N, data.vp, **FLOATS)
    partial = torch.empty(units * data.splits * data.G * data.N, data.vp + 2, **FLOATS)
    call.point(q=padded_rows(query), k=key, v=value, o=output, partial=partial)
    call.point(coef=coef.float().contiguous(), soft=_numbers(soft), sink=_numbers(sink))
    data.k_stride, data.v_stride = strides(key), strides(value)
    call.mask(keep, bias)
    call.cap(cap, shift)
    data.causal = causal
    call.run("attention_decode", kind, int(key.dtype == torch.bfloat16))
    return _cut(output, data.dv_)


def distance_forward(query, key, kind, p) -> Tensor:
    """Return distances (B, H, N, M), float32."""
    call = _Call(_Problem, query, key, 1, p)
    distances = torch.empty(*query.shape[:3], key.shape[2], **FLOATS)
    call.point(q=padded_rows(query), kpanels=_panels(key), sums=distances)
    call.run("distance_forward", kind)
    return distances


def distance_backward(grad, query, key, distances, kind, p) -> tuple[Tensor, Tensor]:
    """Return gradients (query, key) of distances whose heads are not grouped, float32."""
    call = _Call(_Problem, query, key, 1, p)
    rows = {"q": padded_rows(query), "k": padded_rows(key)}
    dq, dk = torch.empty_like(rows["q"]), torch.zeros_like(rows["k"])
    call.point(**rows, kpanels=_panels(key), dout=grad.float().contiguous(), out=distances, dq=dq, dk=dk)
    call.run("distance_backward", kind)
    return _cut(dq, call.data.d), _cut(dk, call.data.d)
