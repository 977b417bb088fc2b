"""``compare`` in this process, with networks of a second."""

import functools
import json
import os

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_feat.compare import StudyError, compare
from tests.compare import cases


def inline(folder, arms, seeds=2, metrics="val/accuracy", **options):
    return compare(arms, seeds, metrics, folder=folder, executor="inline", quiet=True, **options)


BOTH = {"base": cases.base, "faster": cases.faster}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("status.json")}


def test_each_run_is_a_folder_and_the_answer_is_beside_them(tmp_path):
    made = inline(tmp_path, BOTH, metrics=["val/accuracy", "val/loss:min"])
    run = tmp_path / "runs" / "faster" / "seed_1"
    status = json.loads((run / "status.json").read_text())
    assert (status["arm"], status["seed"], status["status"], status["epochs"]) == ("faster", 1, "finished", 2)
    assert status["environment"]["versions"].keys() >= {"torch", "lightning", "numpy", "python"}
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 2 * 2
    assert [effect.metric for effect in made.effects] == ["val/accuracy", "val/loss:min"]
    assert [effect.seeds for effect in made.effects] == [[0, 1]] * 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *(
            "study.json",
            "runs",
            "runs.csv",
            "table.md",
            "cost.md",
            "comparison.png",
            "comparison.pdf",
            ".lock",
            "overview.md",
        )
    }
    assert made.table in str(made)
    assert [answer.split(":")[0] for answer in made.answers] == ["faster, val/accuracy", "faster, val/loss"]


def test_the_same_call_runs_nothing_again_and_a_longer_one_what_is_missing(tmp_path):
    first = inline(tmp_path, BOTH)
    before = times(tmp_path)
    assert inline(tmp_path, BOTH).table == first.table
    assert times(tmp_path) == before
    longer = inline(tmp_path, BOTH | {"draws": cases.draws}, seeds=3)
    assert len(times(tmp_path)) == 9
    assert {path: at for path, at in times(tmp_path).items() if path in before} == before
    assert longer.question.looking  # seeds were added after the others had been seen
    assert not first.question.looking


def test_a_run_does_not_depend_on_those_before_it(tmp_path):
    inline(tmp_path / "a", BOTH, seeds=[0, 1])
    inline(tmp_path / "b", {"faster": cases.faster, "base": cases.base}, seeds=[1])
    metrics = [(tmp_path / where / "runs/faster/seed_1/metrics.csv").read_text() for where in "ab"]
    assert metrics[0] == metrics[1]


def test_a_failed_run_is_reported_the_rest_goes_on_and_it_is_tried_again(tmp_path):
    arms = {"base": cases.base, "fails": cases.fails_with_seed_1}
    made = inline(tmp_path, arms, seeds=3)
    assert made.effects[0].seeds == [0, 2]
    assert "FAILED: fails, seed 1: FloatingPointError: the loss is nan" in made.problems
    assert any("the differences above flatter it" in line for line in made.problems)
    failed = tmp_path / "runs/fails/seed_1/status.json"
    assert json.loads(failed.read_text())["stage"] == "fit"
    before = times(tmp_path)
    assert inline(tmp_path, arms, seeds=3).table == made.table
    changed = {path for path, at in times(tmp_path).items() if before[path] != at}
    assert changed == {failed}


def test_an_arm_that_cannot_be_built_stops_the_study_at_once(tmp_path):
    with pytest.raises(StudyError, match="arm 'broken' cannot be built: KeyError: 'no such network'"):
        inline(tmp_path, {"base": cases.base, "broken": cases.cannot_be_built})
    assert len(times(tmp_path)) == 2
    with pytest.raises(StudyError, match=r"the function gave NoneType: give \(trainer, module, data\)"):
        inline(tmp_path / "b", {"base": cases.gives_nothing, "faster": cases.faster})


@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": 1, "strategy": "ddp_spawn"}])
def test_a_run_of_several_processes_is_refused(options, tmp_path):
    """The first kind starts the command again for each device, of the second nothing comes back."""

    def several():
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
        return trainer, *cases.base()[1:]

    with pytest.raises(StudyError, match=r"would start processes of its own: give trainer.devices=1"):
        inline(tmp_path, {"base": several, "other": several}, metrics="val/loss")


def test_a_metric_that_is_not_logged_stops_the_study_after_the_first_run(tmp_path):
    with pytest.raises(StudyError, match="no run logged 'val/acuracy'; nearest: val/accuracy"):
        inline(tmp_path, BOTH, metrics="val/acuracy", trial=False)
    assert len(times(tmp_path)) == 1
    inline(tmp_path, BOTH)  # after a correction it goes on
    with pytest.raises(StudyError, match="no run logged"):
        inline(tmp_path, BOTH, metrics="val/acuracy", seeds=9)
    assert len(times(tmp_path)) == 4


def test_another_arm_of_the_same_name_is_not_mixed_in(tmp_path):
    inline(tmp_path, BOTH, seeds=1)
    with pytest.raises(ValueError, match="arm 'faster' is another one than that of the runs"):
        inline(tmp_path, {"base": cases.base, "faster": cases.draws}, seeds=1)
    with pytest.raises(ValueError, match=r"share_order=False, but the runs in .* had True"):
        inline(tmp_path, BOTH, seeds=1, share_order=False)


def test_two_studies_do_not_share_a_folder(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="another process works on"):
        inline(tmp_path, BOTH)


def test_it_leaves_this_process_as_it_was(tmp_path):
    torch.manual_seed(5)
    expected, environment = torch.rand(3), dict(os.environ)
    torch.manual_seed(5)
    inline(tmp_path, BOTH, seeds=1)
    assert torch.equal(torch.rand(3), expected)
    assert dict(os.environ) == environment


def test_after_the_fit_the_test(tmp_path):
    def with_test():
        trainer, module, (train, val) = cases.base()
        return trainer, module, {"train": train, "val": val, "test": val}

    made = inline(tmp_path, {"base": with_test, "other": with_test}, seeds=1, metrics="test/accuracy", test=True)
    assert made.records[0].value("test/accuracy") == made.records[0].value("val/accuracy")


def test_what_an_arm_measures_after_the_fit_is_a_metric(tmp_path):
    def measured():
        trainer, module, data = cases.base()
        return (
            trainer,
            module,
            data,
            lambda: {"norm": float(module.network.weight.norm()), "epochs": trainer.current_epoch},
        )

    made = inline(tmp_path, {"base": measured, "other": measured}, metrics=["norm", "epochs"])
    assert [record.value("epochs") for record in made.records] == [2] * 4
    assert len({record.value("norm") for record in made.records}) == 2  # by seed

    def wrong():
        return *cases.base(), 3

    with pytest.raises(StudyError, match="the fourth that its function gave is int: give a function"):
        inline(tmp_path / "wrong", {"base": wrong, "other": wrong})


def test_arms_of_a_seed_begin_with_the_same_start(tmp_path):
    made_for = []

    def pretrained(seed):
        made_for.append(seed)
        return {"weight": torch.rand(3, 2), "bias": torch.zeros(3)}

    def arm(start, lr):
        trainer, module, data = cases.trainer(), cases.Tiny(lr), cases.loaders()
        module.network.load_state_dict(start)
        drawn = float(torch.rand(()))
        return trainer, module, data, lambda: {"start": float(start["weight"].sum()), "drawn": drawn}

    arms = {name: functools.partial(arm, lr=lr) for name, lr in (("base", 0.1), ("faster", 0.5))}
    made = inline(tmp_path, arms, metrics=["start", "drawn"], start=pretrained)
    assert made_for == [0, 1]
    for effect in made.effects:  # also the random numbers after it, be it made or found
        assert effect.differences == [0, 0]
        assert len(set(effect.values)) == 2
    inline(tmp_path, arms, metrics="start", start=pretrained, seeds=3)
    assert made_for == [0, 1, 2]
    with pytest.raises(ValueError, match="is another one than that of the runs"):
        inline(tmp_path, arms, metrics="start", start=lambda seed: {})
    with pytest.raises(StudyError, match="its function takes a start"):
        inline(tmp_path / "without", arms)
    with pytest.raises(StudyError, match="the start gave Linear, which cannot be kept safely"):
        inline(tmp_path / "module", arms, start=lambda seed: torch.nn.Linear(2, 3))


def test_it_stops_once_it_is_told(tmp_path):
    made = inline(tmp_path, BOTH, seeds=40, metrics="val/loss", until_told=100.0)
    seeds = made.effects[0].seeds
    assert len(seeds) == 4  # the first number with an interval
    assert len(times(tmp_path)) == 8
    assert "confidence sequence" in made.table
    assert inline(tmp_path, BOTH, seeds=40, metrics="val/loss", until_told=100.0).table == made.table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 0}, r"seeds=\[\]: give at least one"),
        ({"seeds": [1, 1]}, "none of them twice"),
        ({"metrics": []}, "give at least one"),
        ({"base": "bsae"}, "there is no arm of that name; they are base, faster"),
        ({"level": 95}, "level=95: give a number below 1"),
        ({"until_told": 0}, "give a width above zero"),
        ({"jobs": 0}, "jobs=0: give at least 1"),
        ({"bounds": {"x": (1.0, 0.0)}}, "give the lowest and the highest"),
        ({"arms": {"base": cases.base}}, "give a base and at least one arm"),
        ({"arms": {"base": cases.base, "a/b": cases.base}}, "a folder is named by it"),
        ({"arms": {"base": cases.base, "x": 3}}, "arm 'x' is int: give a function"),
        (
            {"executor": "processes", "arms": {"base": cases.base, "x": lambda: None}},
            "cannot be sent to another process",
        ),
        ({"executor": "threads"}, "choose from processes, inline, slurm"),
    ],
)
def test_mistakes_are_told_in_the_first_second(options, said, tmp_path):
    given = {"arms": BOTH, "folder": tmp_path, "executor": "inline", "quiet": True, **options}
    with pytest.raises(ValueError, match=said):
        compare(given.pop("arms"), **given)
    assert not (tmp_path / "runs").exists()
