"""Which releases of transformers this code was tested with."""

import transformers

OLDEST_TESTED, NEWEST_TESTED = "5.23.0", "5.24.0"


def version_note() -> str:
    """Say which transformers this code was tested with, and which one is here."""
    return (
        f"distattn_hf was tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}, and this is "
        f"{transformers.__version__}"
    )


def is_newer_than_tested() -> bool:
    """Return whether the installed transformers is of a later minor version than the newest tested one."""

    def minor(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    return minor(transformers.__version__) > minor(NEWEST_TESTED)
