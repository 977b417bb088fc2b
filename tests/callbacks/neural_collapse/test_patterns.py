"""Patterns of measures to log."""

import warnings

import pytest

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.callbacks.neural_collapse.patterns import DEFAULT_MEASURES, MeasurePatterns
from lightning_feat.functional.neural_collapse import known_measures
from tests.helpers import Plain, loader, trainer


def test_every_default_is_a_measure():
    assert MeasurePatterns([*DEFAULT_MEASURES]).patterns == MeasurePatterns(None).patterns


def test_a_pattern_of_no_measure_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'nc1_pnv' matches no measure; nearest: .*nc1_pinv"):
        NeuralCollapseMonitor(measures=["cdnv", "nc1_pnv"])


def test_all_measures_are_chosen_by_a_star():
    assert MeasurePatterns(["*"]).choose(known_measures()) == set(known_measures())


def test_a_pattern_that_no_layer_gives_a_measure_for_is_said_once(tmp_path):
    run = trainer(tmp_path, callbacks=NeuralCollapseMonitor(measures=["cdnv", "nc4*"]), max_epochs=3)
    with pytest.warns(
        UserWarning, match=r"measures=\['nc4\*'\]: no layer .* nc4_mismatch .* need mode='exact'"
    ) as said:
        run.fit(Plain(), loader())
    assert len([warning for warning in said if "no layer that is watched" in str(warning.message)]) == 1
    assert [name for name in run.callback_metrics if name.startswith("neural_collapse/")] == [
        "neural_collapse/cdnv/penultimate"
    ]


def test_nothing_is_said_where_each_pattern_has_a_measure(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, callbacks=NeuralCollapseMonitor(measures=["cdnv", "nc3"]), max_epochs=1).fit(
            Plain(), loader()
        )
    assert not [warning for warning in said if "no layer that is watched" in str(warning.message)]
