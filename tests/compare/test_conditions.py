"""The same arms under several conditions, and all metrics side by side."""

import functools

import pytest

from lightning_feat.compare import compare_conditions, report, report_conditions
from lightning_feat.compare.command import run_compare
from lightning_feat.compare.effects import Question, effects_of
from lightning_feat.compare.figure import draw_forest
from lightning_feat.compare.overview import overview
from tests.compare import cases
from tests.compare.helpers import run
from tests.compare.test_command import BASE, RATE


def arm(lr, samples):
    return cases.trainer(), cases.Tiny(lr), cases.loaders(samples)


def arms(samples):
    return {name: functools.partial(arm, lr, samples) for name, lr in (("base", 0.1), ("faster", 0.5))}


def test_each_condition_has_a_study_and_a_base_of_its_own(tmp_path):
    asked = {"seeds": 2, "metrics": ["val/loss", "val/accuracy"], "folder": tmp_path, "quiet": True}
    options = {"executor": "inline", "titles": {"48": "many"}, "heading": "samples"}
    made = compare_conditions({"48": arms(48), "24": arms(24)}, **asked, **options)
    alone = report(tmp_path / "24")
    assert made.comparisons["24"].table == alone.table
    bases = {name: found.effects[0].base_values for name, found in made.comparisons.items()}
    assert bases["48"] != bases["24"]
    lines = made.overview.splitlines()
    assert lines[0] == "| samples | arm | val/loss | val/accuracy (%) |"
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        [f"| {condition}", name] for condition in ("many", "24") for name in ("base", "faster")
    ]
    assert lines[7].startswith("| samples | arm, minus base | ")
    assert len(lines) == 11
    before = (tmp_path / "overview.md").read_text()
    (tmp_path / "overview.md").unlink()
    (tmp_path / "comparison.png").unlink()
    assert report_conditions(tmp_path, quiet=True).overview == made.overview
    assert (tmp_path / "overview.md").read_text() == before
    assert (tmp_path / "comparison.png").is_file()


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="give the arms of at least one"):
        compare_conditions({}, folder=tmp_path)
    with pytest.raises(ValueError, match="condition 'a/b': a folder is named by it"):
        compare_conditions({"a/b": arms(48)}, folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds no conditions\.json"):
        report_conditions(tmp_path)


def test_conditions_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"base": BASE, "rate": RATE, "few": "data: {init_args: {batch_size: 16}}", "more": "{}"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    command = ["--config", "base.yaml", "--arm", "rate=rate.yaml", "--metric", "val/loss", "--seeds", "1"]
    command += ["--condition", "few=few.yaml", "--condition", "more=more.yaml", "--executor", "inline"]
    assert run_compare(command) == 0
    said = capsys.readouterr().out
    assert "| few | rate | " in said
    assert (tmp_path / "comparison/more/table.md").is_file()
    config = (tmp_path / "comparison/few/runs/rate/seed_0/config.yaml").read_text()
    assert "batch_size: 16" in config
    assert "lr: 0.5" in config
    assert run_compare(["--report", "comparison"]) == 0
    assert "| few | rate | " in capsys.readouterr().out
    assert run_compare([*command, "--condition", "few=more.yaml"]) == 2
    assert "there are two of the name 'few'" in capsys.readouterr().err


def records(**values):
    return [run(arm, seed, value, "x") for arm, found in values.items() for seed, value in enumerate(found)]


def part(**values):
    found, question = records(**values), Question("a", ("x",))
    return found, effects_of(found, question), question


def test_the_numbers_of_the_overview():
    text = overview({"": part(a=[1.0, 2.0, 3.0], b=[2.0, 2.5, 4.5])}, {"b": "the other", "x": "measure"})
    mean, change = text.split("\n\n")
    assert mean.splitlines() == ["| arm | measure |", "| --- | --- |", "| a | 2.0 ± 1.0 |", "| the other | 3.0 ± 1.3 |"]
    # Differences 1, 0.5, 1.5: mean 1, deviation 0.5, and t = 4.303 for three seeds.
    assert change.splitlines()[-1] == "| the other | +1.0 [-0.2, +2.2] |"


def test_what_is_not_there_is_left_blank_and_one_seed_has_no_spread():
    nan = float("nan")
    text = overview({"one": part(a=[1.0], b=[2.0]), "two": part(a=[1.0, 2.0], b=[nan, nan])})
    assert "| one | a | 1.00 |" in text
    assert "| one | b | +1.00 |" in text
    assert text.count("| two | b |  |") == 2


def test_a_forest_has_a_panel_for_each_condition_and_metric():
    effects = {"one": part(a=[1.0, 2.0], b=[2.0, 4.0])[1], "two": part(a=[1.0, 2.0], b=[2.0, 2.0], c=[3.0, 3.5])[1]}
    figure = draw_forest(effects, {"two": "second", "b": "arm b"}, "set")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["set one", "second"]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes] == [
        ["arm b"],
        ["arm b", "c"],
    ]
    assert figure.axes[-1].get_xlabel() == "x,\nminus a"
    figure.savefig("/dev/null", format="png")
