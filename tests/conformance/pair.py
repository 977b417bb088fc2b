"""What each of two gloo processes runs, started once: all cells that need a pair. What it finds goes into a file."""

import json
import logging
import sys
import tempfile
import traceback
import warnings
from dataclasses import astuple
from pathlib import Path

import torch

Found = dict[str, list[str]]  # by cell: the word and the detail of an outcome, or "raised" and a traceback


def main(file: Path) -> None:
    from tests.conformance.cells import outcome
    from tests.conformance.conditions import CONDITIONS
    from tests.conformance.registry import CALLBACKS

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: Found = {}
    for condition in CONDITIONS:
        for entry in CALLBACKS if condition.where == "pair" and condition.available else []:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found[f"{entry}, {condition}"] = list(astuple(outcome(entry, condition, Path(folder))))
            except BaseException:
                found[f"{entry}, {condition}"] = ["raised", traceback.format_exc()]
            file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
