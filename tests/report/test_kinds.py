"""Each kind of data leaves out what it cannot have; what does not fit is refused before anything is computed."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from lightning_feat.report import feature_report
from lightning_feat.report.feature_set import FeatureSet
from tests.report.pages import N, body_of, data_of, made


def panels_of(tmp_path, *arguments, **options):
    page = feature_report(*arguments, out=tmp_path / "page.html", **options)
    return page, data_of(page.path)


def test_features_without_labels(tmp_path):
    page, data = panels_of(tmp_path, made()[0].numpy())
    assert page.panels == ["map/features", "spectra/features"]
    assert [*data["panels"]["map-0"]["colours"]] == ["nothing"]
    assert page.numbers.keys() == {"samples", "effective_rank/features"}


def test_classes_without_logits(tmp_path):
    page, data = panels_of(tmp_path, *made()[:2])
    assert [*data["panels"]["map-0"]["colours"]] == ["class"]
    assert not {"confusion", "hardest"} & {*page.panels}
    assert "accuracy" not in page.numbers


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_a_regression_is_coloured_by_its_targets(tmp_path, columns):
    features = made()[0]
    targets = features[:, :columns] if columns else features[:, 0]
    outputs = targets.reshape(N, -1) + 0.1
    page, data = panels_of(tmp_path, features, targets, logits=outputs)
    expected = ["target"] if columns < 2 else ["target 0", "target 1"]
    assert [*data["panels"]["map-0"]["colours"]] == [*expected, "loss"]
    assert not {"confusion", "cosines/features", "collapse/features"} & {*page.panels}
    spread = targets.double().reshape(N, -1).var(0, unbiased=False).sum()
    assert math.isclose(page.numbers["r2"], 1 - 0.01 * max(1, columns) / float(spread), rel_tol=1e-4)


def test_a_single_logit_has_two_classes(tmp_path):
    features = made()[0]
    targets = (features[:, 0] > 0).float()
    logits = torch.where(torch.arange(N) < 6, -1, 1)[:, None] * (2 * targets - 1)[:, None]
    page, _ = panels_of(tmp_path, features, targets, logits=logits)
    assert math.isclose(page.numbers["accuracy"], 1 - 6 / N)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].double(), targets.double())
    assert math.isclose(page.numbers["loss"], float(expected), rel_tol=1e-6)


def test_whole_numbers_beside_one_output_are_values(tmp_path):
    features = made()[0]
    page, _ = panels_of(tmp_path, features, torch.arange(N), logits=torch.arange(N)[:, None] + 0.5)
    assert "r2" in page.numbers


def test_shares_of_classes_count_by_the_largest(tmp_path):
    features, targets, logits = made()
    shares = 0.8 * torch.nn.functional.one_hot(targets, 3) + 0.2 / 3
    page, data = panels_of(tmp_path, features, shares, logits=logits)
    assert data["rows"]["target"] == targets.tolist()
    assert any("largest" in note for note in page.notes)


def test_classes_of_which_some_are_absent(tmp_path):
    features, targets, _ = made()
    logits = torch.zeros(N, 9)
    page, data = panels_of(tmp_path, features, 3 * targets, logits=logits)
    assert data["counts"] == [20, 0, 0, 20, 0, 0, 20, 0, 0]
    assert math.isclose(page.numbers["loss"], math.log(9), rel_tol=1e-6)


def test_one_class_alone_and_constant_features(tmp_path):
    page, _ = panels_of(tmp_path, torch.ones(10, 4), torch.zeros(10, dtype=torch.long), logits=torch.zeros(10, 1))
    assert math.isnan(page.numbers["effective_rank/features"])
    assert "cosines/features" not in page.panels
    assert "not defined" in body_of(page.path)


def test_samples_that_are_not_finite_are_left_out_and_said(tmp_path):
    features, targets, logits = made()
    features[3, 1], features[7, 0] = math.nan, math.inf
    page, data = panels_of(tmp_path, features, targets, logits=logits)
    assert page.numbers["samples"] == N - 2
    assert any(note.startswith("2 samples have features that are not finite") for note in page.notes)
    assert {"#3", "#7"}.isdisjoint(data["rows"]["name"])


def test_more_samples_than_fit_are_drawn_by_the_seed_and_said(tmp_path):
    features, targets, logits = made()
    drawn = [panels_of(tmp_path, features, targets, logits=logits, max_samples=20, seed=seed) for seed in (0, 0, 1)]
    rows = [data["rows"]["index"] for _, data in drawn]
    assert rows[0] == rows[1] != rows[2]
    assert len({*rows[0]}) == 20
    page, _ = drawn[0]
    assert math.isclose(page.numbers["accuracy"], float((logits.argmax(1) == targets)[rows[0]].double().mean()))
    assert "20 of 60" in body_of(page.path)
    assert any("drawn at random with seed" in note for note in drawn[2][0].notes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"features": torch.ones(5)}, r"have shape \(5,\) .* must be real and \(N, D\)"),
        ({"features": torch.ones(5, 2, 2)}, "pool or flatten feature maps"),
        ({"features": {}}, "there are none"),
        ({"features": torch.ones(1, 3)}, "1 samples of 3 features are too few"),
        ({"features": {"a": torch.ones(4, 2), "b": torch.ones(5, 2)}}, "different numbers of rows"),
        ({"features": "x.pt"}, "str is no array of numbers"),
        ({"features": torch.full((4, 2), torch.nan)}, "4 are not finite; nothing is left"),
        ({"targets": torch.zeros(3)}, "targets has 3 rows, but the features have 4"),
        ({"targets": torch.tensor([0, 1, -1, 0])}, "-1 is no class index"),
        ({"targets": torch.tensor([0.5, 1, math.nan, 0])}, "some are not finite"),
        ({"logits": torch.zeros(5, 2)}, "logits has 5 rows"),
        ({"names": ["a"]}, "names has 1 rows"),
        ({"targets": torch.tensor([0, 1, 2, 0]), "class_names": ["a", "b"]}, "class_names has 2 names, .* have 3"),
        ({"pictures": torch.zeros(3, 8, 8)}, r"pictures have shape .*: give 4 of them"),
        ({"weight": torch.zeros(2, 9)}, r"weight has shape \(2, 9\): give \(C, 2\)"),
        ({"basis": torch.zeros(2, 9)}, r"basis has shape"),
        ({"before": torch.zeros(4, 7)}, "before: shapes"),
        ({"out": "page.pdf"}, "'page.pdf': .* ends in .html"),
        ({"out": "nowhere/page.html"}, "there is no folder"),
        ({"max_samples": 10**6}, "max_samples=1000000: give 2 to 20000"),
        ({"map": "lle"}, "map='lle': choose from pca, tsne, umap"),
        ({"save": "f.pt"}, "save f.pt: .*safetensors or .npz"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        feature_report(**{"features": torch.eye(4)[:, :2], "out": "page.html", **arguments})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("missing", "options", "said"),
    [
        ("vl_convert", {}, r'vl-convert-python: pip install "lightning-feat\[report\]"'),
        ("umap", {"map": "umap"}, "pip install umap-learn"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, missing, options, said):
    found = importlib.util.find_spec
    for module in ("page", "embedding"):
        monkeypatch.setattr(
            f"lightning_feat.report.{module}.find_spec", lambda name: None if name == missing else found(name)
        )
    with pytest.raises(ModuleNotFoundError, match=said):
        feature_report(torch.eye(4), out=tmp_path / "page.html", **options)
    assert [*tmp_path.iterdir()] == []


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page = feature_report(made()[0], out=tmp_path / "page.html")
    before = page.path.read_bytes()

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="no space"):
        feature_report(2 * made()[0], out=tmp_path / "page.html")
    assert page.path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [page.path]


def test_arrays_of_numpy_and_lists_are_the_same_as_tensors(tmp_path):
    features, targets, logits = made()
    a, _ = panels_of(tmp_path, features, targets, logits=logits)
    b, _ = panels_of(tmp_path, features.numpy().astype(np.float64), targets.tolist(), logits=logits.numpy())
    assert a.numbers == b.numbers


def test_a_set_can_be_taken_apart():
    rows = FeatureSet({"a": made()[0]}, made()[1], names=[str(i) for i in range(N)])
    assert rows.take(torch.tensor([5, 2])).names == ["5", "2"]
    assert len(rows.take(torch.tensor([5, 2, 1]))) == 3
