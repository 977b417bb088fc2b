"""``lightning-feat doctor --config FILE``: the options are those of ``lightning-feat fit``, and three of its own."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_feat.doctor.examination import doctor
from lightning_feat.doctor.finding import Finding, as_text

_USAGE = "lightning-feat doctor --config FILE [--batches N] [--no-cost] [--json] [options of lightning-feat fit]"


class _Built(BaseException):
    """Carries what the command line built past the place where it would fit. No error, which somebody might catch."""

    def __init__(self, cli: Any) -> None:
        super().__init__()
        self.cli = cli


def run_doctor(arguments: Sequence[str]) -> int:
    """Examine the run that these arguments of ``fit`` describe, and print the findings.

    Weights that a model asks for are not downloaded: they must be in the cache.

    Returns:
        The exit status: 1 where something is wrong, else 0.
    """
    parser = argparse.ArgumentParser(
        "lightning-feat doctor", usage=_USAGE, description=__doc__, add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--batches", type=int, default=3, help="batches to train on")
    parser.add_argument("--no-cost", action="store_true", help="leave out what each callback costs")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    own, rest = parser.parse_known_args(list(arguments))
    if own.help:
        parser.print_help()
        return 0
    if own.batches < 2:
        parser.error(f"--batches {own.batches}: give at least 2, as some faults show after the first step.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        cli = _build(rest)
    except Exception as error:  # whatever the user's configuration and classes raise
        findings = [_not_built(error)]
    else:
        findings = doctor(cli.trainer, cli.model, datamodule=cli.datamodule, batches=own.batches, cost=not own.no_cost)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(json.dumps([asdict(f) for f in findings], indent=2) if own.json else as_text(findings))
    return int(any(finding.severity == "error" for finding in findings))


def _build(arguments: list[str]) -> Any:
    from lightning.pytorch.cli import LightningCLI

    class Builder(LightningCLI):
        def before_fit(self) -> None:
            raise _Built(self)

    before = sys.argv
    sys.argv = [before[0]]  # LightningCLI warns of arguments given twice
    try:
        Builder(args=["fit", *arguments], save_config_callback=None)
    except _Built as built:
        return built.cli
    finally:
        sys.argv = before
    raise RuntimeError("LightningCLI did not come to the fit.")


def _not_built(error: Exception) -> Finding:
    return Finding(
        "error",
        "not-built",
        "configuration",
        f"{type(error).__name__}: {' '.join(str(error).split())}",
        "The run that it describes cannot be built.",
        "Correct it. The doctor downloads nothing: weights and data must be there.",
    )
