"""Imports point one way, and core/ stays what transformers can copy beside a checkpoint: flat, and found by a regex."""

import ast
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import distattn_hf

PACKAGE = Path(distattn_hf.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
CORE = [path for path in FILES if path.parts[0] == "core" and path.name != "__init__.py"]

# A file in core/ imports only from files in earlier rows. A new file needs a place here.
CORE_ORDER = [
    (
        "configuration_distattn",
        "versions",
        "registry",
        "cpp_tiles",
        "cpp_forward",
        "cpp_backward",
        "cpp_decode",
        "cpp_hybrid",
        "cpp_far",
    ),
    ("compatibility",),
    ("cpp_library", "triton_tile"),
    ("triton_forward", "triton_backward"),
    ("hybrid_cpu", "far_cpu"),
    ("metric_checks",),
    ("metrics", "masks", "landmarks", "statistics"),
    ("hybrid", "inputs"),
    ("sdpa_cosine",),
    ("reference", "backend_*"),
    ("backends",),
    ("attention", "explain", "options"),
    ("discovery",),
    ("monitor", "loading"),
    ("mechanism_base", "layers"),
    ("layers_stack",),
    ("mechanism_linear", "mechanism_linformer", "mechanism_relative", "mechanism_windows"),
    ("mechanism_bigbird", "mechanism_landmark", "mechanism_performer"),
    ("mechanisms",),
    ("nystrom", "parameters"),
    ("relative_bias",),
    ("cache",),
    ("linear",),
    ("interface",),
    ("modeling_converted",),
    ("configuration_native", "encodings"),
    ("native_attention", "layers_factory"),
    ("native_layers",),
    ("modeling_distattn",),
    ("modeling_distattn_seq2seq",),
]

# Folder or file of the package -> what it may import of the package, itself included.
ALLOWED = {
    "__init__": {"auto_classes"},
    "auto_classes": {"core"},
    "core": {"core"},
    "conversion": {"core", "conversion"},
    "training": {"core", "conversion", "training"},
    "analysis": {"core", "conversion", "training", "analysis"},
    "experiments": {"core", "conversion", "training", "analysis", "experiments"},
    "hub": {"core", "conversion", "hub"},
    "cli": {"core", "conversion", "training", "analysis", "experiments", "hub", "cli", "auto_classes", "__init__"},
}

# transformers.dynamic_module_utils.get_relative_imports: how it finds the files to copy with a modelling file.
COPIED_BY_TRANSFORMERS = (r"^\s*from\s+\.(\S+)\s+import", r"^\s*import\s+\.(\S+)\s*$")


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import statement, those inside functions included; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found.extend((0, alias.name, []) for alias in node.names)
    return found


def within_package(path: Path) -> set[str]:
    """The folders (or top-level files) of the package that a file imports from."""
    targets = set()
    for level, module, names in imports(path):
        if level == 0 and module.partition(".")[0] != PACKAGE.name:
            continue
        parts = module.split(".")[1:] if level == 0 else [*path.parts[: len(path.parts) - level], *module.split(".")]
        parts = [part for part in parts if part]
        # `from . import name` and `import distattn_hf` at the top name a folder, or the package's own names.
        targets.update(parts[:1] or [n if (PACKAGE / n).exists() else "__init__" for n in names] or ["__init__"])
    return targets


def rank(module: str) -> int | None:
    return next((i for i, row in enumerate(CORE_ORDER) if any(fnmatchcase(module, name) for name in row)), None)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_folders_import_only_from_below(path):
    home = path.parts[0].removesuffix(".py")
    assert home in ALLOWED, f"{path}: say in ALLOWED what it may import"
    assert within_package(path) <= ALLOWED[home], f"{path} imports from above"


@pytest.mark.parametrize("path", CORE, ids=str)
def test_core_imports_torch_transformers_the_standard_library_and_siblings(path):
    for level, module, names in imports(path):
        if level == 0:
            top = module.partition(".")[0]
            allowed = {"torch", "transformers"} | sys.stdlib_module_names
            if path.name.startswith("triton_"):
                # Inside `try`, so that a checkpoint's copy does not ask for Triton: tests/core/test_triton.py.
                allowed |= {"triton"}
            assert top in allowed, f"{path} imports {module}"
        else:
            said = f"{path}: `from {'.' * level}{module} import {', '.join(names)}`"
            assert level == 1, f"{said} leaves core/"
            assert re.fullmatch(r"\w+", module), f"{said} is not `from .sibling import name`"
            assert "*" not in names, said
            assert (PACKAGE / "core" / f"{module}.py").exists(), f"{said}: no such sibling"


@pytest.mark.parametrize("path", CORE, ids=str)
def test_core_files_import_from_earlier_ones(path):
    own = rank(path.stem)
    assert own is not None, f"{path}: give it a row in CORE_ORDER"
    for level, module, _ in imports(path):
        if level == 1:
            assert rank(module) is not None, f"{path} imports {module}, which has no row in CORE_ORDER"
            assert rank(module) < own, f"{path} imports {module}, which comes later or stands beside it"


@pytest.mark.parametrize("path", CORE, ids=str)
def test_core_text_that_looks_like_an_import_is_one(path):
    """A docstring's example `from .name import x` would make transformers look for a file name.py."""
    text = (PACKAGE / path).read_text(encoding="utf-8")
    looked_for = {name for pattern in COPIED_BY_TRANSFORMERS for name in re.findall(pattern, text, flags=re.MULTILINE)}
    assert looked_for == {module for level, module, _ in imports(path) if level == 1}


@pytest.mark.parametrize("name", ["configuration_distattn", "configuration_native"])
def test_configuration_needs_no_torch(name):
    """Reading a config must be quick, and possible where torch is not installed."""
    path = Path(f"core/{name}.py")
    assert not [module for level, module, _ in imports(path) if level == 0 and module.partition(".")[0] == "torch"]


def test_core_package_file_holds_no_code():
    """`core/__init__.py` is not copied with a checkpoint: whatever it did would be missing there."""
    body = ast.parse((PACKAGE / "core" / "__init__.py").read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


@pytest.mark.parametrize(
    ("path", "source", "targets"),
    [
        ("core/a.py", "from .b import c", {"core"}),
        ("core/a.py", "from ..conversion.plan import c", {"conversion"}),
        ("core/a.py", "from .. import conversion", {"conversion"}),
        ("core/a.py", "def f():\n    import distattn_hf.data.datasets", {"training"}),
        ("core/a.py", "from distattn_hf.analysis import plots", {"analysis"}),
        ("core/a.py", "import distattn_hf", {"__init__"}),
        ("core/a.py", "import torch.nn\nfrom transformers import core", set()),
        ("cli.py", "from .hub import push\nfrom . import experiments", {"hub", "experiments"}),
        ("experiments/a/b.py", "from ...core.metrics import c\nfrom ..d import e", {"core", "experiments"}),
    ],
)
def test_the_reader_of_imports_sees_each_form(path, source, targets, tmp_path, monkeypatch):
    """The tests above are worth what this function sees."""
    package = tmp_path / "distattn_hf"
    for folder in ("core", "conversion", "experiments/a"):
        (package / folder).mkdir(parents=True)
    (package / path).write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    assert within_package(Path(path)) == targets
