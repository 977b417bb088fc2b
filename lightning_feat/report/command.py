"""``lightning-feat report``: one page about the features of a checkpoint, or of a file of features."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_USAGE = """lightning-feat report --config FILE --ckpt_path FILE [--ckpt_path FILE ...] [--layer NAME ...] [--out FILE]
       lightning-feat report --features FILE [--out FILE]"""
_END = """The first checkpoint is the one the page is about; others are what it is compared with, such as the first of
the run. Options of `lightning-feat fit` may follow; the Trainer gets no logger."""
_POOLINGS = ("mean", "max", "first", "last", "tokens")
_ENDINGS = (".safetensors", ".npz")


def run_report(arguments: Sequence[str]) -> int:
    """Do what these arguments say, and print where the page is and its numbers.

    Returns:
        The exit status: 2 for a mistake in the arguments, 130 where it was interrupted.
    """
    parser = _parser()
    own, rest = parser.parse_known_args(list(arguments))
    try:
        _check(own, rest)  # before torch is imported
        page = _from_file(own) if own.features else _from_checkpoints(own, rest)
    except (ValueError, ModuleNotFoundError, RuntimeError) as error:
        print(f"lightning-feat report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; no page was written.", file=sys.stderr)
        return 130
    if page is not None:
        for name, value in page.numbers.items():
            print(f"{name:40} {value:.4g}")
        for note in page.notes:
            print(f"Note: {note}")
        print(f"Page: {page.path}" + (f"; features: {own.save}" if own.save else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-feat report", usage=_USAGE, description=__doc__, epilog=_END, allow_abbrev=False
    )
    add: Any = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE", help="the run; several, one over the other")
    add("--ckpt_path", action="append", default=[], metavar="FILE", help="checkpoint; without one the first weights")
    add("--features", metavar="FILE", help="features that --save wrote, in place of a network")
    add(
        "--layer",
        action="append",
        metavar="NAME",
        help="submodule by its dotted name (default: input of the classifier)",
    )
    add("--read", choices=("output", "input"), help="of the layers (default: output)")
    add("--pooling", choices=_POOLINGS, help="how features that are not (N, D) become so; tokens: each is a sample")
    add("--data", choices=("val", "train", "test"), default="val", help="which data of the run (default val)")
    add("--out", default="features.html", metavar="FILE", help="the page (default features.html)")
    add("--save", metavar="FILE", help="keep the features, too: .safetensors or .npz")
    add("--map", choices=("pca", "tsne", "umap"), default="pca", help="shown first (default pca)")
    add("--title", help="of the page (default: name of the checkpoint or the file)")
    add("--classifier", metavar="NAME", help="the classifier by its dotted name, where it cannot be found")
    add("--target_key", metavar="KEY", help="where a batch keeps its targets: a position or a name")
    add("--mask_key", metavar="KEY", help="where a batch keeps which tokens count")
    add("--ignore_index", type=int, default=-100, help="target of rows that are left out (default -100)")
    add(
        "--max_samples", type=int, default=10_000, help="samples, beyond which a seeded sample is taken (default 10000)"
    )
    add("--megabytes", type=float, default=512.0, help="memory for the features of a checkpoint (default 512)")
    add("--seed", type=int, default=0, help="of the sample (default 0)")
    return parser


def _check(own: argparse.Namespace, rest: Sequence[str]) -> None:
    if own.features and (own.config or own.ckpt_path or rest):
        raise ValueError("--features takes a file of features: leave out --config, --ckpt_path and options of a run.")
    if own.features and own.layer:
        raise ValueError("--features FILE has layers of its own: leave out --layer.")
    if not own.features and not own.config:
        raise ValueError(
            "give the run by --config FILE and --ckpt_path FILE, or a file of features by --features FILE."
        )
    for option, paths in (("--config", own.config), ("--ckpt_path", own.ckpt_path), ("--features", [own.features])):
        for path in filter(None, paths):
            remote = "://" in path
            if not remote and not (Path(path).is_file() or (option == "--ckpt_path" and Path(path).is_dir())):
                raise ValueError(f"{option} {path}: there is no such file.")
    for option, path, endings in (("--out", own.out, (".html", ".htm")), ("--save", own.save, _ENDINGS)):
        if path is None:
            continue
        if Path(path).suffix.lower() not in endings:
            raise ValueError(f"{option} {path}: give a name that ends in {' or '.join(endings)}.")
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {Path(path).absolute().parent}; make it first.")
    if not 2 <= own.max_samples <= 20_000:
        raise ValueError(f"--max_samples {own.max_samples}: give 2 to 20000, so that the page stays under 15 MB.")
    if not own.megabytes > 0:
        raise ValueError(f"--megabytes {own.megabytes}: give some memory.")
    if own.layer and len({*own.layer}) < len(own.layer):
        raise ValueError(f"--layer: {', '.join(own.layer)}: name each once.")
    missing = [
        package for module, package in (("vl_convert", "vl-convert-python"), ("PIL", "pillow")) if not find_spec(module)
    ]
    if missing:
        raise ModuleNotFoundError(f'the page needs {" and ".join(missing)}: pip install "lightning-feat[report]"')


def _options(own: argparse.Namespace, title: str) -> dict[str, Any]:
    return {
        "title": own.title or title,
        "map": own.map,
        "max_samples": own.max_samples,
        "seed": own.seed,
        "save": own.save,
    }


def _from_file(own: argparse.Namespace) -> Any:
    from lightning_feat.report.features_file import load_features
    from lightning_feat.report.writing import check_output, write_report

    check_output(own.out, own.map, own.max_samples, own.save)
    rows = load_features(own.features)
    return write_report(rows, own.out, **_options(own, f"Features in {Path(own.features).name}"))


def _from_checkpoints(own: argparse.Namespace, rest: Sequence[str]) -> Any:
    from lightning_feat.report.collecting.checkpoints import Question, collect_checkpoints
    from lightning_feat.report.collecting.collect import Budget
    from lightning_feat.report.collecting.ears import Ears
    from lightning_feat.report.writing import check_output, write_report

    check_output(own.out, own.map, own.max_samples, own.save)
    keys = [
        None if key is None else int(key) if key.lstrip("-").isdigit() else key
        for key in (own.target_key, own.mask_key)
    ]
    ears = Ears(own.layer or [None], own.read, own.pooling, own.classifier, keys[0], own.ignore_index, keys[1])
    budget = Budget(own.max_samples, own.max_samples, own.megabytes, own.seed)
    configs = [part for path in own.config for part in ("--config", path)]
    question = Question([*configs, *rest], own.ckpt_path or [None], own.data, ears, budget)
    found = collect_checkpoints(question)
    if found is None:
        return None  # a process that only helped
    first = own.ckpt_path[0] if own.ckpt_path else "the first weights"
    options = _options(own, f"Features of {Path(first).name}")
    return write_report(found.rows, own.out, before=found.before, learned=found.learned, **options)
