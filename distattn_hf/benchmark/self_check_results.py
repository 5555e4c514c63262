"""What `distattn check` found, and how it is told."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .results import machine


@dataclass
class Check:
    """One result: error and bound where there are such, or a note; passed is None where nothing was asked."""

    group: str
    name: str
    passed: bool | None
    error: float | None = None
    bound: float | None = None
    note: str = ""
    failures: list = field(default_factory=list)


def lines(report: dict) -> Iterator[str]:
    """Yield a line for each group of a report, and for each check that failed or only says something."""
    yield machine(report["provenance"])
    groups: dict[str, list[dict]] = {}
    for check in report["checks"]:
        groups.setdefault(check["group"], []).append(check)
    for group, checks in groups.items():
        asked = [check for check in checks if check["passed"] is not None]
        shares = [check["error"] / check["bound"] for check in asked if check["bound"] and check["error"] is not None]
        worst = f", worst at {max(shares):.2f} of its bound" if shares else ""
        if asked:
            yield f"{group:<16} {sum(check['passed'] for check in asked):>3} of {len(asked)} ok{worst}"
        for check in checks:
            if check["passed"] is None:
                yield f"{group:<16} {check['name']}: {check['note']}"
            elif not check["passed"]:
                said = check["note"] or "; ".join(
                    f"{f['what']} {f['error']} > {f['bound']:g}" for f in check["failures"]
                )
                said = said or f"error {check['error']:.2e} > {check['bound']:.2e}"
                yield f"  FAILED: {check['name']}: {said}"
    summary = report["summary"]
    share = f"{summary['passed']} of {summary['total']} passed ({100 * summary['success_rate']:.0f}%)"
    yield f"{share} in {summary['seconds']:g} s"
