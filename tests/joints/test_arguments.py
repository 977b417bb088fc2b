"""Arguments of constructors: checked by their annotations, made plain, everywhere."""

import dataclasses
import enum
import importlib
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch

from lightning_feat.baselines import CubicCNN, MLPClassifier
from lightning_feat.baselines.baseline import Baseline
from lightning_feat.callbacks import (
    CurvePlotter,
    FeatureShiftMonitor,
    GrassmannMonitor,
    NeuralCollapseMonitor,
    Panel,
    SimplexETFHead,
    SimplicityBiasUpsampler,
    SummaryTable,
    WeightSchedule,
)
from lightning_feat.joints.arguments import check_fields, checked, plain
from lightning_feat.layers import GrassmannLinear
from tests.helpers import Plain, loader, trainer

ROOMS = ("callbacks", "layers", "metrics", "data", "optim", "baselines")


def public_classes():
    for room in ROOMS:
        names = importlib.import_module(f"lightning_feat.{room}").__all__
        yield from (getattr(importlib.import_module(f"lightning_feat.{room}"), name) for name in names)


CLASSES = sorted(
    {c for c in public_classes() if inspect.isclass(c) and c.__module__.startswith("lightning_feat")}, key=str
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_public_constructor_is_checked(cls):
    if dataclasses.is_dataclass(cls):
        checks = "check_fields" in inspect.getsource(cls) or all(f.type is not int for f in dataclasses.fields(cls))
        assert checks or cls.__name__ == "Selection"  # made by the pass alone
    elif cls.__name__ == "IndexedDataset":
        pass  # takes whatever has indices, and says itself what has none
    elif not issubclass(cls, (Baseline, tuple, torch.nn.Module)) or "lightning_feat.layers" in cls.__module__:
        assert getattr(cls.__init__, "_checks_arguments", False), f"decorate {cls.__name__}.__init__ with checked"


@pytest.mark.parametrize("cls", [c for c in CLASSES if issubclass(c, Baseline)], ids=lambda cls: cls.__name__)
def test_an_argument_of_a_baseline_that_means_nothing_is_named(cls):
    parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    fits = {"words": ["zero"], "model_name": "resnet18"}
    required = {n: fits.get(n, 2) for n, parameter in parameters.items() if parameter.default is parameter.empty}
    for name in parameters:
        with pytest.raises(ValueError, match=f"{cls.__name__}: {name}="):
            cls(**{**required, name: object()})


class Shape(Protocol):
    def area(self) -> float: ...


def given(hint, value):
    """What a constructor gets whose argument has this annotation."""

    class Taker:
        @checked
        def __init__(self, x: Any, **rest: Any) -> None:
            self.x = x

    Taker.__init__.__wrapped__.__annotations__["x"] = hint
    return Taker(value, more="other").x


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    LARGE = 3


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, np.int64(3), 3),
        (int, Size.LARGE, 3),
        (int, torch.tensor(3), 3),
        (int, 1e4, 10_000),
        (float, 2, 2.0),
        (float, np.float32(0.5), 0.5),
        (float, float("inf"), float("inf")),
        (bool, np.bool_(False), False),
        (bool, 1, True),
        (str, np.str_("fc"), "fc"),
        (str, Colour.RED, "red"),
        (str | None, pathlib.Path("a") / "b", "a/b"),
        (list[str] | None, "nc1*", ["nc1*"]),
        (list[str] | None, ("a", "b"), ["a", "b"]),
        (str | list[str] | None, "fc", "fc"),
        (str | list[str] | None, ("fc", "body"), ["fc", "body"]),
        (Sequence[str], "fc", ["fc"]),
        (Sequence[float], np.array([0.5, 1.0]), [0.5, 1.0]),
        (Sequence[int], (np.int64(1), 2), (1, 2)),
        (tuple[int, ...], [1, 2], (1, 2)),
        (dict[str, int], {"a": np.int64(1)}, {"a": 1}),
        (float | int | Literal["knee"], np.int64(8), 8),
        (float | int | Literal["knee"], 0.5, 0.5),
        (Literal["a", "b"], np.str_("b"), "b"),
        (int | Callable[..., Any] | str | None, "label", "label"),
        (Shape | None, 5, 5),
        (Any, "anything", "anything"),
    ],
)
def test_what_can_only_mean_one_thing_is_taken_as_that(hint, value, expected):
    taken = given(hint, value)
    assert taken == expected
    assert type(taken) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, 2.5, "Taker: x=2.5: give a whole number."),
        (int, True, "x=True: give a whole number"),
        (int, "3", "x='3': give a whole number"),
        (float, float("nan"), "x=nan: give a number"),
        (bool, "false", "x='false': give True or False"),
        (str, 3, "x=3: give a string"),
        (list[str], {"a", "b"}, "give a list of strings"),
        (list[str], ["a", 3], "give a list of strings"),
        (Sequence[float], "0.5", "x='0.5': give a list of numbers"),
        (int | Literal["log"], "lin", "x='lin': give a whole number or 'log'"),
        (Literal["train", "val"] | None, "test", "x='test': choose 'train', 'val' or None"),
        (Callable[..., Any] | None, "lambda x: x", "give a function or None"),
        (dict[str, str] | None, "a", "x='a': give a dict or None"),
        (torch.Tensor, [1], "give a Tensor"),
    ],
)
def test_what_does_not_fit_is_named_with_its_value_and_what_to_give(hint, value, said):
    with pytest.raises(ValueError, match="x=") as raised:
        given(hint, value)
    assert said in str(raised.value)


def test_what_fits_is_the_very_same_object():
    for hint, value in ((list[int], [1, 2]), (dict[str, int], {"a": 1}), (torch.Tensor, torch.ones(2)), (Mapping, {})):
        assert given(hint, value) is value


def test_unknown_and_missing_arguments_are_left_to_python():
    with pytest.raises(TypeError, match="unexpected keyword argument 'everyn'"):
        GrassmannMonitor(everyn=3)
    with pytest.raises(TypeError, match=r"missing .* required"):
        GrassmannLinear(4)


def test_the_signature_stays():
    assert "every_n_epochs" in inspect.signature(NeuralCollapseMonitor).parameters


def test_fields_of_a_dataclass_are_checked_too():
    assert type(WeightSchedule(np.float64(0.5)).peak) is float
    assert Panel("train/*", "loss").metrics == ["train/*"]
    with pytest.raises(ValueError, match=r"WeightSchedule: start_epoch='two': give a whole number\."):
        WeightSchedule(start_epoch="two")

    @dataclasses.dataclass
    class Point:
        x: int

        def __post_init__(self) -> None:
            check_fields(self)

    assert plain(Point(np.int8(1)).x) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NeuralCollapseMonitor(every_n_epochs=2.5), "NeuralCollapseMonitor: every_n_epochs=2.5: give"),
        (lambda: NeuralCollapseMonitor(figures="false"), "figures='false': give True or False"),
        (
            lambda: NeuralCollapseMonitor(thresholds=["nc1"]),
            r"thresholds=\['nc1'\]: give a list of CollapseThreshold",
        ),
        (lambda: SimplicityBiasUpsampler(factor="2"), "factor='2': give a whole number"),
        (lambda: SimplicityBiasUpsampler(forward="run"), "forward='run': give a function or None"),
        (lambda: FeatureShiftMonitor(pooling="avg"), "pooling='avg': choose 'mean'"),
        (lambda: GrassmannMonitor(max_pairs="all"), "max_pairs='all': give a whole number"),
        (lambda: MLPClassifier("64", 3), "MLPClassifier: in_features='64': give a whole number"),
    ],
)
def test_a_wrong_type_is_said_by_the_class_that_got_it(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_string_where_patterns_are_meant_is_one_pattern():
    assert NeuralCollapseMonitor(measures="nc1*").measures.patterns == ("nc1*",)
    assert SummaryTable("val/*").metrics == ["val/*"]
    assert CurvePlotter([Panel("val/*", "v")]).panels[0].metrics == ["val/*"]
    assert FeatureShiftMonitor(text_layers="t.0", image_layers="i.0").text_layers == ["t.0"]


def test_numbers_of_numpy_leave_a_checkpoint_that_loads_by_weights_only(tmp_path):
    run = trainer(tmp_path, callbacks=[SimplexETFHead(seed=np.int64(3), scale=np.float32(5.0))], max_epochs=1)
    run.fit(Plain(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    torch.load(tmp_path / "plain.ckpt", weights_only=True)


def test_recorded_arguments_of_a_baseline_are_plain_also_those_of_a_subclass(tmp_path):
    class Mine(MLPClassifier):
        def __init__(self, depth, **rest):
            super().__init__(**rest)

    module = Mine(depth=2, in_features=np.int64(4), num_classes=np.int64(3), dropout=np.float32(0.5))
    assert module.hparams["depth"] == 2
    assert {type(module.hparams[name]) for name in ("in_features", "num_classes", "dropout")} == {int, float}
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    torch.load(tmp_path / "plain.ckpt", weights_only=True)


def test_a_baseline_without_options_of_its_optimizer_records_none():
    assert CubicCNN().hparams["lr"] is None
    assert CubicCNN().lr == 0.1
