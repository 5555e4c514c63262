"""Fetch transformers' own common model tests, which tests/common runs against the converted models.

python scripts/fetch_common_tests.py

The source distribution of the installed transformers release is downloaded with pip, and the files below go to
tests/.external/transformers-<version>/tests, which git ignores. (A release ships only the top level of tests/:
the per-model and the generation tests are in its git repository alone.) Does nothing when the files are there.
"""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")


def fetch() -> Path:
    """Download and unpack once; returns the folder. Exits with a message when pip or the archive lets us down."""
    release = version("transformers")
    target = ROOT / "tests" / ".external" / f"transformers-{release}"
    if all((target / "tests" / name).is_file() for name in NEEDED):
        print(f"{target.relative_to(ROOT)}: already there")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = download(release, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archive) as source:
            members = {m.name: m for m in source.getmembers()}
            wanted = [f"transformers-{release}/tests/{name}" for name in NEEDED]
            if missing := [name for name in wanted if name not in members]:
                sys.exit(f"{archive.name} does not hold {missing[0]}; tests/common cannot run with this release")
            source.extractall(unpacked, members=[members[name] for name in wanted], filter="data")
        # The repository has this empty file, the release has not; one of the tests looks for it.
        (unpacked / f"transformers-{release}" / "tests" / "__init__.py").touch()
        shutil.rmtree(target, ignore_errors=True)
        (unpacked / f"transformers-{release}").replace(target)
    print(f"{target.relative_to(ROOT)}: {len(NEEDED)} files")
    return target


def download(release: str, folder: Path) -> Path:
    """The sdist of one release of transformers. pip prepares its metadata with setuptools: ours where we have it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")
    command += ["--dest", str(folder), f"transformers=={release}"]
    print(" ".join(command[1:]))
    if subprocess.run(command).returncode:
        sys.exit(f"pip could not get the source distribution of transformers {release} (is it a released version?)")
    return next(folder.glob("transformers-*.tar.gz"))


if __name__ == "__main__":
    fetch()
