"""Features in a file come back as they were, and the page from the file says the same."""

import json
import re

import numpy as np
import pytest
import torch

from lightning_feat.report import feature_report
from lightning_feat.report.command import run_report
from lightning_feat.report.feature_set import FeatureSet
from lightning_feat.report.features_file import load_features, save_features
from tests.report.pages import N, made


def full_set():
    features, targets, logits = made()
    rows = FeatureSet({"net.3": features, "fc": features[:, :2]}, targets, logits, torch.arange(N) * 3, total=500)
    rows.names, rows.class_names, rows.notes = [f"é<{i}>.png" for i in range(N)], ["a", "b", "c"], ["one note"]
    return rows


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_a_set_comes_back_as_it_was(tmp_path, ending):
    rows = full_set()
    save_features(rows, str(tmp_path / f"f{ending}"))
    back = load_features(str(tmp_path / f"f{ending}"))
    assert back.layers == rows.layers
    for layer in rows.layers:
        assert torch.equal(back.features[layer], rows.features[layer])
    for name in ("targets", "logits", "indices"):
        assert torch.equal(getattr(back, name), getattr(rows, name)), name
    assert (back.names, back.class_names, back.notes, back.total) == (rows.names, ["a", "b", "c"], ["one note"], 500)
    assert [path.name for path in tmp_path.iterdir()] == [f"f{ending}"]


def test_the_names_that_other_tools_look_for(tmp_path):
    from safetensors import safe_open

    save_features(full_set(), str(tmp_path / "f.npz"))
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert {"features", "targets", "logits", "indices", "layer"} <= {*file.files}
        assert file["features"].shape == (N, 6)
        assert file["layer"].tolist() == ["net.3", "fc"]
    save_features(full_set(), str(tmp_path / "f.safetensors"))
    with safe_open(tmp_path / "f.safetensors", framework="np") as file:
        assert file.get_tensor("targets").tolist() == full_set().targets.tolist()
        assert json.loads(file.metadata()["layer"]) == ["net.3", "fc"]


def test_the_page_from_a_file_is_the_page_from_the_arrays(tmp_path, capsys):
    features, targets, logits = made()
    arguments = {"logits": logits, "pictures": torch.rand(N, 9, 9), "class_names": ["a", "b", "c"], "title": "T"}
    page = feature_report(features, targets, out=tmp_path / "a.html", save=str(tmp_path / "f.npz"), **arguments)
    assert run_report(["--features", str(tmp_path / "f.npz"), "--out", str(tmp_path / "b.html"), "--title", "T"]) == 0
    assert f"accuracy{'':33}{page.numbers['accuracy']:.4g}" in capsys.readouterr().out
    a, b = (
        (tmp_path / name).read_text().replace('<p class="quiet">f.npz', '<p class="quiet">')
        for name in ("a.html", "b.html")
    )
    assert a == b


def test_features_alone_from_another_tool(tmp_path):
    np.savez(tmp_path / "f.npz", features=made()[0].double().numpy(), labels=np.array(["x"] * N))
    rows = load_features(str(tmp_path / "f.npz"))
    assert rows.kind == "none"
    assert rows.features["layer 0"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the run by --config FILE and --ckpt_path FILE, or a file of features by --features FILE"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--config", "run.yaml", "--ckpt_path", "last.ckpt"], "--ckpt_path last.ckpt: there is no such file"),
        (["--features", "nowhere.npz"], "--features nowhere.npz: there is no such file"),
        (["--features", "run.yaml"], "features are kept in .safetensors or .npz"),
        (["--features", "empty.npz"], "empty.npz holds x, but no array called 'features'"),
        (["--features", "broken.safetensors"], "broken.safetensors cannot be read"),
        (["--features", "pickled.npz"], "pickled.npz cannot be read"),
        (["--features", "empty.npz", "--config", "run.yaml"], "leave out --config"),
        (["--features", "empty.npz", "--trainer.devices=2"], "leave out --config, --ckpt_path and options of a run"),
        (["--features", "empty.npz", "--layer", "fc"], "leave out --layer"),
        (["--config", "run.yaml", "--out", "page.pdf"], "--out page.pdf: give a name that ends in .html"),
        (["--config", "run.yaml", "--out", "no/page.html"], "--out no/page.html: there is no folder"),
        (["--config", "run.yaml", "--save", "f.pt"], "--save f.pt: give a name that ends in .safetensors or .npz"),
        (["--config", "run.yaml", "--max_samples", "1"], "--max_samples 1: give 2 to 20000"),
        (["--config", "run.yaml", "--megabytes", "0"], "--megabytes 0.0: give some memory"),
        (["--config", "run.yaml", "--layer", "fc", "--layer", "fc"], "name each once"),
    ],
)
def test_mistakes_end_with_a_sentence_and_no_traceback(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {}\n")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", features=np.array([{}], dtype=object))
    before = {*tmp_path.iterdir()}
    assert run_report(arguments) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("lightning-feat report: ")
    assert re.search(re.escape(said), err.splitlines()[-1])
    assert {*tmp_path.iterdir()} == before


def test_mistakes_are_told_before_torch_is_imported():
    import subprocess
    import sys

    code = (
        "import sys; from lightning_feat.report.command import run_report; "
        "code = run_report(['--features', 'nowhere.npz']); "
        "sys.exit(10 * bool({'torch', 'lightning'} & {*sys.modules}) + code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2
