"""Imports point one way, and core/ stays what transformers can copy beside a checkpoint: flat, and found by a regex."""

import ast
import re
import sys
from pathlib import Path

import pytest

import distattn_hf

PACKAGE = Path(distattn_hf.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
CORE = [path for path in FILES if path.parts[0] == "core" and path.name != "__init__.py"]

# From the lowest floor to the highest: a folder or file imports only from lower rows and from itself.
FLOORS = [
    ("core",),
    ("connection",),
    ("functional", "storage", "data"),
    ("layers",),
    ("conversion",),
    ("evaluation",),
    ("hub", "training", "analysis"),
    ("benchmark",),
    ("experiments",),
    ("auto_classes",),
    ("moved",),
    ("__init__",),
    ("commands",),
    ("cli",),
]
# What `auto_map` names in saved checkpoints: these names stay.
ENTRIES = {
    "converted": ("modeling_converted", "configuration_distattn"),
    "native": ("modeling_distattn", "configuration_native"),
    "native, encoder-decoder": ("modeling_distattn_seq2seq", "configuration_native"),
}
# How many files travel with a checkpoint of each kind, at most.
MOST_FILES = {"converted": 52, "native": 63, "native, encoder-decoder": 64}

# What files of core/ import from above, inside `try`: without the package a checkpoint's own code does without.
AT_HOME = {
    "base_weights.py": {"distattn_hf.storage.models"},
    "families.py": {"distattn_hf.analysis.monitor"},
    "modeling_converted.py": {"distattn_hf.conversion.report", "distattn_hf.storage.adapters"},
}

# transformers.dynamic_module_utils.get_relative_imports: how it finds the files to copy with a modelling file.
COPIED_BY_TRANSFORMERS = (r"^\s*from\s+\.(\S+)\s+import", r"^\s*import\s+\.(\S+)\s*$")


def imports(path: Path, top_only: bool = False) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of the import statements, those inside functions included or not; level 0 is absolute."""
    found, tree = [], ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
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


def floor(home: str) -> int:
    return next(number for number, homes in enumerate(FLOORS) if home in homes)


def closure(entries: tuple[str, ...]) -> set[str]:
    """The files that transformers copies with these, by its own rule."""
    found, to_read = set(), list(entries)
    while to_read:
        if (name := to_read.pop()) not in found:
            found.add(name)
            text = (PACKAGE / "core" / f"{name}.py").read_text(encoding="utf-8")
            to_read += [
                other for pattern in COPIED_BY_TRANSFORMERS for other in re.findall(pattern, text, re.MULTILINE)
            ]
    return found


def test_core_is_exactly_what_travels():
    """A file that no checkpoint needs belongs elsewhere; one outside core/ would be missing beside a checkpoint."""
    travelling = set().union(*map(closure, ENTRIES.values()))
    assert travelling == {path.stem for path in CORE}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_checkpoint_carries_few_files(kind):
    assert len(closure(ENTRIES[kind])) <= MOST_FILES[kind]


def test_no_file_name_twice():
    names = [path.name for path in FILES if path.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=str)
def test_folders_import_only_from_below(path):
    home = path.parts[0].removesuffix(".py")
    allowed = {module.split(".")[1] for module in AT_HOME.get(path.name, ())} if home == "core" else set()
    for other in within_package(path) - allowed:
        assert other == home or floor(other) < floor(home), f"{path} imports {other}, which is not below it"


def test_no_circles():
    """Imports at the top of files, so that each can be imported first."""
    graph = {path: set() for path in FILES}
    for path in FILES:
        for level, module, _ in imports(path, top_only=True):
            if level and module:
                target = Path(*path.parts[: len(path.parts) - level], *module.split(".")).with_suffix(".py")
                graph[path] |= {target} & graph.keys()
    while leaves := {path for path, targets in graph.items() if not targets & graph.keys()}:
        graph = {path: targets for path, targets in graph.items() if path not in leaves}
    assert not graph


@pytest.mark.parametrize("path", CORE, ids=str)
def test_core_imports_torch_transformers_the_standard_library_and_siblings(path):
    for level, module, names in imports(path):
        if level == 0:
            top = module.partition(".")[0]
            # transformers itself needs safetensors.
            allowed = {"torch", "transformers", "safetensors"} | sys.stdlib_module_names
            if module in AT_HOME.get(path.name, ()):
                continue
            if path.name.startswith("kernel_triton_"):
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
        ("core/a.py", "def f():\n    import distattn_hf.data.datasets", {"data"}),
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
