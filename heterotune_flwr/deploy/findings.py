"""What a check has found, for people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One checked thing: how it stands, in a line, and how to mend it."""

    name: str
    state: State
    message: str
    mend: str = ""


def render(findings: Sequence[Finding], good: str, bad: str) -> str:
    """The findings as lines for a terminal, ending with the verdict: ``good``, or ``bad`` and how many are to mend."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:5} {finding.name:10} {finding.message}")
        if finding.mend:
            lines.append(f"{'':16} -> {finding.mend}")
    failed = sum(finding.state == "fail" for finding in findings)
    lines.append(f"{bad}: {failed} to mend" if failed else good)
    return "\n".join(lines)


def ready(findings: Sequence[Finding]) -> bool:
    """Whether nothing is in the way."""
    return all(finding.state != "fail" for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as one JSON object: ``ready`` and ``checks``."""
    checks = [asdict(finding) for finding in findings]
    return json.dumps({"ready": ready(findings), "checks": checks})
