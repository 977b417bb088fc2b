"""The page: its numbers are those of the functions, and it needs nothing else."""

import html
import math
import re

import pytest
import torch

from lightning_feat.functional.common.class_sums import class_sums
from lightning_feat.functional.feature_shift import relative_shift
from lightning_feat.functional.grassmann import principal_angles
from lightning_feat.functional.neural_collapse import (
    centered_class_means,
    class_distance_normalized_variance,
    cosine_matrix,
    nc1_quotient,
    nc2_etf_error,
)
from lightning_feat.functional.transfer import nearest_neighbours, neighbour_accuracy
from lightning_feat.report import feature_report
from lightning_feat.report.panels.panel import number
from tests.report.pages import CLASSES, D, N, body_of, data_of, made


def page_of(tmp_path, *arguments, **options):
    made_page = feature_report(*arguments, out=tmp_path / "page.html", **options)
    return made_page, data_of(made_page.path), body_of(made_page.path)


def test_the_headlines_are_the_values_of_the_functions(tmp_path):
    features, targets, logits = made()
    page, _, body = page_of(tmp_path, {"fc": features}, targets, logits=logits)
    totals = class_sums(features, targets, CLASSES)
    index, _ = nearest_neighbours(features - features.mean(0), 8)
    distance = torch.cdist(features.double(), totals.sums / totals.counts[:, None])
    expected = {
        "samples": N,
        "accuracy": (logits.argmax(1) == targets).double().mean(),
        "loss": torch.nn.functional.cross_entropy(logits.double(), targets),
        "nc1_quotient/fc": nc1_quotient(totals),
        "nc2_cosine_std/fc": cosine_matrix(centered_class_means(totals))[[0, 0, 1], [1, 2, 2]].std(unbiased=False),
        "neighbour_accuracy/fc": neighbour_accuracy(index, targets),
        "ncc_accuracy/fc": (distance.argmin(1) == targets).double().mean(),
    }
    for name, value in expected.items():
        assert math.isclose(page.numbers[name], float(value), rel_tol=1e-9), name
    assert number(page.numbers["nc1_quotient/fc"]) in body
    assert f"{100 * page.numbers['accuracy']:.1f} %" in body


def test_the_table_of_collapse_holds_the_values_of_the_functions(tmp_path):
    features, targets, logits = made()
    _, _, body = page_of(tmp_path, features, targets, logits=logits)
    totals = class_sums(features, targets, CLASSES)
    for value in (class_distance_normalized_variance(totals), nc2_etf_error(centered_class_means(totals))):
        assert f"<td>{number(float(value))}</td>" in body


def test_cosines_and_confusion_are_in_the_chart_and_in_the_table(tmp_path):
    features, targets, logits = made()
    _, data, _ = page_of(tmp_path, features, targets, logits=logits, class_names=["a", "b", "c"])
    cosines = cosine_matrix(centered_class_means(class_sums(features, targets, CLASSES)))
    cells = {(c["r"], c["c"]): c["v"] for c in data["panels"]["cosines-0"]["charts"][0]["data"]["values"]}
    shares = {(c["r"], c["c"]): c["v"] for c in data["panels"]["confusion-all"]["charts"][0]["data"]["values"]}
    for i, row in enumerate("abc"):
        for j, column in enumerate("abc"):
            assert math.isclose(cells[row, column], float(cosines[i, j]), abs_tol=1e-12)
            share = (logits.argmax(1)[targets == i] == j).double().mean()
            assert math.isclose(shares[row, column], float(share), rel_tol=1e-6)


def test_neighbours_are_those_of_the_function(tmp_path):
    import base64

    import numpy as np

    features, targets, _ = made()
    _, data, _ = page_of(tmp_path, features, targets)
    index, cosine = nearest_neighbours(features - features.mean(0), 8)
    packed = data["neighbours"][0]
    assert np.frombuffer(base64.b64decode(packed["rows"]), "<i4").reshape(N, 8).tolist() == index.tolist()
    found = np.frombuffer(base64.b64decode(packed["cosines"]), "<i2").reshape(N, 8) / 1e4
    assert abs(found - cosine.numpy()).max() <= 6e-5  # kept in units of 1e-4


def test_the_map_is_the_principal_plane(tmp_path):
    features, targets, _ = made()
    _, data, _ = page_of(tmp_path, features, targets)
    found = data["panels"]["map-0"]["maps"][0]
    left, value, _ = torch.linalg.svd(features.double() - features.double().mean(0), full_matrices=False)
    for k, axis in enumerate("xy"):
        place = torch.tensor(found[axis], dtype=torch.float64)
        expected = left[:, k] * value[k]
        assert min((place - expected).abs().max(), (place + expected).abs().max()) < 1e-3
        share = float(value[k] ** 2 / value.square().sum())
        assert f"{100 * share:.1f} %" in found["axes"][k]


def test_spectra_sum_to_the_variance(tmp_path):
    features, targets, _ = made()
    _, data, _ = page_of(tmp_path, features, targets)
    points = data["panels"]["spectra-0"]["charts"][0]["data"]["values"]
    mean = torch.stack([features[targets == c].double().mean(0) for c in range(CLASSES)])
    within = (features.double() - mean[targets]).square().sum(1).mean()
    assert math.isclose(sum(p["v"] for p in points if p["kind"] == "within classes"), float(within), rel_tol=1e-4)
    assert sum(p["kind"] == "between classes" for p in points) == CLASSES - 1


def test_movement_and_subspaces_are_those_of_the_functions(tmp_path):
    features, targets, logits = made()
    before = features * 1.5 + 0.1
    basis = torch.linalg.qr(torch.randn(CLASSES, D, 2, generator=torch.Generator().manual_seed(1)))[0].mT
    page, data, _ = page_of(tmp_path, {"fc": features}, targets, logits=logits, before={"fc": before}, basis=basis)
    values = {v["class"]: v["v"] for v in data["panels"]["movement-all"]["charts"][0]["data"]["values"]}
    assert math.isclose(values["all samples"], float(relative_shift(features, before)), rel_tol=1e-6)
    assert math.isclose(values["1"], float(relative_shift(features[targets == 1], before[targets == 1])), rel_tol=1e-6)
    cells = {(c["r"], c["c"]): c["v"] for c in data["panels"]["subspaces-all"]["charts"][0]["data"]["values"]}
    angle = principal_angles(basis[0].double(), basis[2].double()).mean().rad2deg()
    assert math.isclose(cells["0", "2"], float(angle), rel_tol=1e-6)
    assert {"movement", "subspaces", "hardest", "confusion"} <= {*page.panels}


def test_the_hardest_examples_are_those_of_largest_loss(tmp_path):
    features, targets, logits = made()
    _, data, _ = page_of(tmp_path, features, targets, logits=logits)
    loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    rows = [entry["row"] for entry in data["panels"]["hardest-all"]["gallery"]]
    assert rows == loss.argsort(descending=True)[: len(rows)].tolist()


def test_collapsed_classes_have_what_is_expected_of_their_counts(tmp_path):
    from lightning_feat.functional.neural_collapse import seli_vectors
    from lightning_feat.report.feature_set import FeatureSet
    from lightning_feat.report.measured import Measured

    counts = torch.tensor([40, 10, 5, 5])
    targets = torch.repeat_interleave(torch.arange(4), counts)
    measured = Measured(FeatureSet({"fc": seli_vectors(counts)[1][targets].float()}, targets), "fc")
    assert measured.expected.keys() == measured.collapse.keys()
    for name, value in measured.collapse.items():
        assert math.isclose(value, measured.expected[name], abs_tol=1e-5), name
    assert measured.expected["nc2_equinorm"] > 0.1  # unequal counts: no simplex
    assert torch.allclose(measured.cosines, measured.expected_cosines, atol=1e-5)


def test_the_page_stands_alone_and_is_small(tmp_path):
    features, targets, logits = made()
    page, _, body = page_of(tmp_path, features, targets, logits=logits, pictures=torch.rand(N, 3, 40, 30))
    text = page.path.read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|img|iframe)[^>]*? src=|<link[^>]+href=\"(?!data:)|@import", body)
    assert not re.search(r"url\(|@import", re.search(r"<style>(.*?)</style>", text, re.S)[1])
    assert "default-src 'none'" in text
    assert page.path.stat().st_size < 3e6
    assert [*tmp_path.iterdir()] == [page.path]
    assert body.count("<h1") == 1
    for article in re.findall(r"<article.*?</article>", body, re.S):
        assert re.search(r"<h3[^>]*>\S", article)
        assert re.search(r'class="unit">\S', article)


@pytest.mark.parametrize(
    "bad", ["<b>x</b>", "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;"]
)
def test_labels_and_names_are_only_ever_text(tmp_path, bad):
    features, targets, logits = made()
    names = [f"{bad}{i}" for i in range(N)]
    options = {"class_names": [bad, "b", "c"], "names": names, "title": bad}
    page, data, body = page_of(tmp_path, {bad: features}, targets, logits=logits, **options)
    assert bad not in body.replace(html.escape(bad), "")
    assert html.escape(bad) in body
    assert data["classes"][0] == bad
    assert data["rows"]["name"][0].startswith(f"{bad}0")
    text = page.path.read_text(encoding="utf-8")
    assert text.count("</script>") == 3
    assert "alert(1)</script>" not in text


def test_percent_signs_in_a_title_are_no_places_to_fill(tmp_path):
    _, _, body = page_of(tmp_path, made()[0], title="%%data%% of %%vega%%")
    assert "<h1>%%data%% of %%vega%%</h1>" in body


def test_several_layers_each_have_their_panels(tmp_path):
    features, targets, _ = made()
    page, data, body = page_of(tmp_path, {"a.b": features, "c": features[:, :3] ** 2}, targets)
    assert {"map/a.b", "map/c", "cosines/c", "spectra/c", "collapse/c"} <= {*page.panels}
    assert data["layers"] == ["a.b", "c"]
    assert body.count('<details class="layer"') == 1
