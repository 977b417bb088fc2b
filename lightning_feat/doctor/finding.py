"""What the doctor has to say."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Severity: TypeAlias = Literal["error", "warning", "note"]

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        severity: an ``"error"`` is wrong now or will be, a ``"warning"`` may be meant, a ``"note"`` only informs.
        check: what was looked at, a name that does not change.
        where: the callback, layer or loader.
        what: what is the case.
        why: what follows from it.
        remedy: what to do.
    """

    severity: Severity
    check: str
    where: str
    what: str
    why: str = ""
    remedy: str = ""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; each finding once, and those of a kind in the order they were found."""
    ranks = {severity: i for i, severity in enumerate(get_args(Severity))}
    return sorted(dict.fromkeys(findings), key=lambda finding: ranks[finding.severity])


def as_text(findings: Sequence[Finding]) -> str:
    """The findings in plain sentences.

    Example:
        >>> print(as_text([Finding("warning", "sampler", "training data", "it is replaced.", remedy="Use another.")]))
        warning: training data (sampler)
          it is replaced.
          do: Use another.
        <BLANKLINE>
        0 errors, 1 warning, 0 notes.
    """
    lines: list[str] = []
    for finding in in_order(findings):
        lines.append(f"{finding.severity}: {finding.where} ({finding.check})")
        for label, sentence in (("", finding.what), ("why: ", finding.why), ("do: ", finding.remedy)):
            if sentence:
                blanks = "  " + " " * len(label)
                lines += textwrap.wrap(sentence, _WIDTH, initial_indent=f"  {label}", subsequent_indent=blanks)
        lines.append("")
    counts = {severity: sum(f.severity == severity for f in findings) for severity in get_args(Severity)}
    numbers = ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts.items())
    return "\n".join([*lines, f"{numbers}."])
