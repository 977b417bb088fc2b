import pytest

from lightning_feat.compare.records import (
    clear_partial,
    complete_or_absent,
    read_run,
    read_runs,
    run_path,
    split_metric,
    write_curves,
    write_json,
)


def write_run(folder, status="finished", value=0.1 + 0.2):
    with complete_or_absent(folder) as partial:
        write_curves(partial / "metrics.csv", {"val/loss": [(1.0, value), (2.0, 1e-300)]})
        write_json(partial / "status.json", {"arm": "a", "seed": 3, "status": status})


def test_a_run_comes_back_with_all_digits(tmp_path):
    write_run(run_path(tmp_path, "a", 3))
    (record,) = read_runs(tmp_path)
    assert (record.arm, record.seed, record.finished) == ("a", 3, True)
    assert record.curves == {"val/loss": [(1.0, 0.1 + 0.2), (2.0, 1e-300)]}


def test_a_run_that_is_broken_off_is_not_there(tmp_path):
    folder = run_path(tmp_path, "a", 3)

    def interrupted():
        with complete_or_absent(folder) as partial:
            write_json(partial / "status.json", {"arm": "a", "seed": 3, "status": "finished"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_runs(tmp_path) == []
    assert len(list(folder.parent.iterdir())) == 1
    clear_partial(tmp_path)
    assert list(folder.parent.iterdir()) == []


def test_a_process_that_was_left_alone_cannot_complete_what_was_cleared(tmp_path):
    folder = run_path(tmp_path, "a", 3)

    def left_alone():
        with complete_or_absent(folder) as partial:
            clear_partial(tmp_path)
            write_json(partial / "status.json", {"arm": "a", "seed": 3, "status": "finished"})

    with pytest.raises(FileNotFoundError):
        left_alone()
    assert read_runs(tmp_path) == []


def test_a_failed_run_gives_way_to_a_new_one(tmp_path):
    folder = run_path(tmp_path, "a", 3)
    write_run(folder, "failed")
    assert not read_run(folder).finished
    write_run(folder)
    assert read_run(folder).finished
    assert [path.name for path in folder.parent.iterdir()] == ["seed_3"]


def test_what_cannot_be_read_is_named(tmp_path):
    folder = run_path(tmp_path, "a", 3)
    write_run(folder)
    (folder / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"says that its run is finished, but has no metrics.csv"):
        read_run(folder)
    (folder / "status.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read: .* Remove its folder to do this run again"):
        read_run(folder)


@pytest.mark.parametrize(
    ("metric", "parts"),
    [("val/loss", ("val/loss", "last")), ("val/loss:min", ("val/loss", "min")), ("a:b", ("a:b", "last"))],
)
def test_which_value_counts(metric, parts):
    assert split_metric(metric) == parts
