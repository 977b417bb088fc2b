import pytest

from lightning_feat.compare.effects import Question, effects_of
from lightning_feat.compare.figure import draw, save_figure
from tests.compare.helpers import runs


@pytest.fixture
def made():
    base, arm = [[0.2, 0.5], [0.3, 0.6], [0.25, 0.5]], [[0.3, 0.7], [0.4, 0.75], [0.3, 0.72]]
    records = runs(base=base, arm=arm)
    question = Question("base", ("val/accuracy",))
    return records, effects_of(records, question), question


def test_it_shows_each_seed_the_mean_the_interval_and_the_curves(made):
    left, right = draw(*made).axes
    zero, seeds, interval, mean = left.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert list(seeds.get_xdata()) == pytest.approx([20, 15, 22])
    assert list(interval.get_xdata()) == pytest.approx([100 * end for end in made[1][0].interval])
    assert list(mean.get_xdata()) == pytest.approx([19])
    assert "points" in left.get_xlabel()
    assert [line.get_label() for line in right.lines] == ["base", "arm"]
    assert list(right.lines[0].get_ydata()) == pytest.approx([25, 100 * 1.6 / 3])
    assert len(right.collections) == 2  # the bands


def test_runs_without_a_partner_or_an_interval_can_be_drawn(made, tmp_path):
    question = Question("base", ("val/accuracy", "val/nothing"))
    records = [record for record in made[0] if record.seed == 0 or record.arm == "base"]
    paths = save_figure(records, effects_of(records, question), question, {}, tmp_path / "figure")
    assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
    assert all(path.stat().st_size > 1000 for path in paths)
