import csv
import json

import pytest

from lightning_feat.compare import report
from lightning_feat.compare.foreign import seed_of
from lightning_feat.compare.records import complete_or_absent, run_path, write_curves, write_json


def write_study(folder, seeds, digest="d", **arms):
    """A finished study without training; ``arms`` gives a value for each seed."""
    folder.mkdir(parents=True)
    study = {"base": "base", "metrics": ["val/accuracy"], "seeds": seeds, "level": 0.95, "until_told": None}
    study |= {"arms": {arm: {"digest": digest} for arm in arms}, "looks": [len(seeds)], "bounds": {}}
    write_json(folder / "study.json", study)
    for arm, values in arms.items():
        for seed, value in zip(seeds, values, strict=True):
            with complete_or_absent(run_path(folder, arm, seed)) as partial:
                write_curves(partial / "metrics.csv", {"val/accuracy": [(1.0, value)]})
                write_json(partial / "status.json", {"arm": arm, "seed": seed, "status": "finished"})
    return folder


def write_csv_logger(folder, value, seed=None):
    """What CSVLogger writes: training and validation in lines of their own."""
    folder.mkdir(parents=True)
    lines = ["epoch,step,train/loss,val/accuracy", "0,1,0.9,", "0,3,0.8,", "0,3,,0.1", "1,7,0.5,", f"1,7,,{value}"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")


def test_table_and_figure_come_again(tmp_path):
    folder = write_study(tmp_path / "a", [0, 1, 2], base=[0.5, 0.6, 0.7], arm=[0.6, 0.75, 0.8])
    first = report(folder)
    table = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    (folder / "comparison.png").unlink()
    assert report(folder).table == first.table == table == (folder / "table.md").read_text()
    assert (folder / "comparison.png").is_file()


def test_several_folders_are_one_study(tmp_path):
    base, arm = [0.5, 0.6, 0.7, 0.55], [0.6, 0.75, 0.8, 0.61]
    whole = write_study(tmp_path / "whole", [0, 1, 2, 3], base=base, arm=arm)
    one = write_study(tmp_path / "one", [0, 1], base=base[:2], arm=arm[:2])
    two = write_study(tmp_path / "two", [2, 3], base=base[2:], arm=arm[2:])
    assert report(one, two, out=tmp_path / "both").table == report(whole).table
    assert len(list(csv.DictReader((tmp_path / "both" / "runs.csv").open()))) == 8


def test_folders_that_do_not_go_together_are_refused(tmp_path):
    one = write_study(tmp_path / "one", [0, 1], base=[0.1, 0.2], arm=[0.2, 0.3])
    two = write_study(tmp_path / "two", [1, 2], base=[0.1, 0.2], arm=[0.2, 0.3])
    three = write_study(tmp_path / "three", [5], digest="another", base=[0.1], arm=[0.2])
    with pytest.raises(ValueError, match=r"seed 1 of arm '(arm|base)' is in .*one.* and in .*two"):
        report(one, two)
    with pytest.raises(ValueError, match=r"arm 'base' is another one in .*one than in .*three"):
        report(one, three)


def test_a_look_at_an_unfinished_study_is_remembered(tmp_path):
    """Who looks before the end and goes on has looked twice: only the sequence holds then."""
    folder = write_study(tmp_path / "a", [0, 1, 2, 3, 4], base=[0.5] * 5, arm=[0.6, 0.61, 0.6, 0.59, 0.6])
    study = json.loads((folder / "study.json").read_text())
    write_json(folder / "study.json", study | {"looks": []})
    hidden = run_path(folder, "arm", 4)
    hidden.rename(tmp_path / "hidden")
    assert not report(folder).question.looking
    (tmp_path / "hidden").rename(hidden)
    made = report(folder)
    assert made.question.looking
    assert "valid at every look" in made.table
    assert report(folder).table == made.table


def test_folders_of_csv_logger_paired_by_the_seeds_of_their_configurations(tmp_path):
    for version, seed in enumerate((3, 4, 5)):
        write_csv_logger(tmp_path / "plain" / f"version_{version}", 0.5 + 0.1 * version, seed)
        write_csv_logger(tmp_path / "head" / f"version_{version}", 0.61 + 0.1 * version + 0.01 * (version == 1), seed)
    made = report(tmp_path / "plain", tmp_path / "head", metrics="val/accuracy", out=tmp_path / "out")
    (effect,) = made.effects
    assert (effect.base, effect.arm, effect.seeds) == ("plain", "head", [3, 4, 5])
    assert effect.differences == pytest.approx([0.11, 0.12, 0.11])
    assert made.records[0].curves == {"train/loss": [(1.0, 0.8), (2.0, 0.5)], "val/accuracy": [(1.0, 0.1), (2.0, 0.5)]}
    together = report(tmp_path, metrics="val/accuracy", base="plain", out=tmp_path / "out2")
    assert together.effects == made.effects


def test_folders_of_csv_logger_without_seeds_are_named_and_not_paired(tmp_path):
    for version in range(3):
        write_csv_logger(tmp_path / "x" / f"version_{version}", 0.5 + 0.1 * version)
        write_csv_logger(tmp_path / "y" / f"version_{version}", 0.6 + 0.1 * version)
    made = report(f"old={tmp_path / 'x'}", f"new={tmp_path / 'y'}", metrics=["val/accuracy"], out=tmp_path / "out")
    (effect,) = made.effects
    assert (effect.base, effect.arm, effect.paired) == ("old", "new", False)
    assert "not paired (Welch)" in made.table


def test_a_seed_is_read_from_where_lightning_leaves_it(tmp_path):
    (tmp_path / "hparams.yaml").write_text("lr: 0.1\nseed: 7\n")
    assert seed_of(tmp_path) == 7
    (tmp_path / "config.yaml").write_text("seed_everything: true\n")  # which seed, nobody knows
    (tmp_path / "hparams.yaml").unlink()
    assert seed_of(tmp_path) is None
    (tmp_path / "seed_12").mkdir()
    assert seed_of(tmp_path / "seed_12") == 12


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        report(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither study.json nor a metrics.csv"):
        report(tmp_path / "empty")
    write_csv_logger(tmp_path / "plain" / "version_0", 0.5, 0)
    with pytest.raises(ValueError, match="give the metrics to compare; the runs logged train/loss, val/accuracy"):
        report(tmp_path / "plain")
    with pytest.raises(ValueError, match="no run logged 'val/acuracy'; nearest: val/accuracy"):
        report(tmp_path / "plain", metrics="val/acuracy")
    with pytest.raises(ValueError, match="runs of 'plain' alone"):
        report(tmp_path / "plain", metrics="val/accuracy", out=tmp_path / "out")
