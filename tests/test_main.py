import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_feat.__main__ import (
    SUBCOMMANDS,
    find_recipe,
    main,
    recipe_files,
    recipe_folder,
    what_it_shows,
    with_recipes,
)
from lightning_feat.data import write_example_cifar, write_example_folder

RECIPES = sorted(
    path.relative_to(recipe_folder()).with_suffix("").as_posix() for path in recipe_folder().rglob("*.yaml")
)
SCRIPTS = sorted(recipe_folder().rglob("*.py"))


def configs_of(recipe):
    """Itself; an arm lies over the base that its first line names."""
    first = (recipe_folder() / f"{recipe}.yaml").read_text().splitlines()[0]
    base = re.findall(r"compare --config (\S+)", first)
    return [part for name in (*base, recipe) for part in ("--config", name)]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"])
def test_a_recipe_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_recipe(name)).samefile(recipe_folder() / "quickstart.yaml")


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("{}")
    assert find_recipe("quickstart") == "quickstart"


def test_an_unknown_recipe_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r"no recipe of that name; the recipes are: .*quickstart"):
        find_recipe("quickstrat")
    with pytest.raises(SystemExit, match="lightning-feat: there is no file 'quickstrat'"):
        main(["fit", "--config", "quickstrat"])


def test_help_lists_every_subcommand_and_imports_neither_lightning_nor_torch():
    code = "import sys; from lightning_feat.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in SUBCOMMANDS)


def test_the_subcommands_are_those_of_lightning_and_our_own():
    assert SUBCOMMANDS.keys() == {*LightningCLI.subcommands(), "doctor", "compare", "report", "recipes"}


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("fti", "did you mean 'fit'"),
        ("docter", "did you mean 'doctor'"),
        ("compair", "did you mean 'compare'"),
        ("xyz", "they are fit, "),
    ],
)
def test_a_misspelt_subcommand_is_answered_with_the_nearest(wrong, answer):
    with pytest.raises(SystemExit, match=f"no subcommand '{wrong}': {answer}"):
        main([wrong, "--config", "quickstart"])


def test_only_the_values_of_config_are_replaced():
    path = str(recipe_folder() / "quickstart.yaml")
    given = ["fit", "--config", "quickstart", "--trainer.max_epochs", "3", "--config=quickstart"]
    assert with_recipes(given) == ["fit", "--config", path, "--trainer.max_epochs", "3", f"--config={path}"]


def test_the_files_of_arms_and_conditions_may_be_recipes():
    path = str(recipe_folder() / "quickstart.yaml")
    given = ["compare", "--arm", "a=quickstart,quickstart.yaml", "--condition=b=quickstart", "--arm", "alone"]
    assert with_recipes(given) == ["compare", "--arm", f"a={path},{path}", f"--condition=b={path}", "--arm", "alone"]
    assert with_recipes(["compare", "--arm", "a=quickstrat"]) == ["compare", "--arm", "a=quickstrat"]


def run(*command, folder):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_for_a_moment(recipe, tmp_path):
    text = (recipe_folder() / f"{recipe}.yaml").read_text()
    if "ElpvDataModule" in text:
        pytest.importorskip("elpv_dataset")
    command = ["-m", "lightning_feat", "fit", *configs_of(recipe), "--trainer.fast_dev_run", "true"]
    if "ImageFolderDataModule" in text:  # images of one's own, and several devices
        command += ["--data.root", str(write_example_folder(tmp_path / "images")), "--data.batch_size", "4"]
        command += ["--data.num_workers", "0", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    if "BaseToNovelDataModule" in text:  # random weights in place of a download
        pytest.importorskip("open_clip")
        root = write_example_folder(tmp_path / "images", num_classes=4, train_images=2, val_images=1)
        command += ["--data.root", str(root), "--data.batch_size", "2", "--data.num_workers", "0"]
        command += ["--model.pretrained", "null", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    if "CifarDataModule" in text:  # files of one's own, and a GPU
        kind = "cifar100" if "cifar100" in recipe else "cifar10"
        command += ["--data.root", str(write_example_cifar(tmp_path / "cifar", kind, 4, 4)), "--data.batch_size", "4"]
        command += ["--data.num_workers", "0", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    run(*command, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_runs_for_a_moment(script, tmp_path):
    if "load_elpv" in script.read_text():
        pytest.importorskip("elpv_dataset")
    run(str(script), "--fast", folder=tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses_and_prints_its_config(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-feat", "fit", *configs_of(recipe), "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "class_path: lightning_feat" in capsys.readouterr().out


def test_without_jsonargparse_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r'pip install "lightning-feat\[recipes\]"'):
        main(["fit"])


def test_it_is_lightning_cli(monkeypatch):
    seen = []
    monkeypatch.setattr(LightningCLI, "__init__", lambda self, args=None: seen.append(args))
    main(["validate", "--config", "quickstart"])
    assert seen == [["validate", "--config", str(recipe_folder() / "quickstart.yaml")]]


def test_the_doctor_gets_the_arguments_of_fit(monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_feat.doctor.command.run_doctor", lambda given: seen.append(given) or 1)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--config", "quickstart", "--no-cost"])
    assert end.value.code == 1
    assert seen == [["--config", str(recipe_folder() / "quickstart.yaml"), "--no-cost"]]


def test_compare_gets_its_arguments_and_the_path_of_a_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_feat.compare.command.run_compare", lambda given: seen.append(given) or 2)
    with pytest.raises(SystemExit) as end:
        main(["compare", "--config", "quickstart", "--arm", "a=b.yaml"])
    assert end.value.code == 2
    assert seen == [["--config", str(recipe_folder() / "quickstart.yaml"), "--arm", "a=b.yaml"]]


def test_recipes_lists_each_with_a_sentence(capsys):
    main(["recipes"])
    printed = capsys.readouterr().out
    assert {*recipe_files()} == {*RECIPES, *(path.relative_to(recipe_folder()).as_posix() for path in SCRIPTS)}
    for name, path in recipe_files().items():
        assert f"{name}\n  " in printed
        sentence = what_it_shows(path)
        assert 20 < len(sentence) < 250, (name, sentence)
        assert not sentence.startswith(("lightning-feat", "pip", "python")), (name, sentence)


def test_recipes_show_prints_one_and_where_it_is(capsys):
    main(["recipes", "show", "quickstart.yaml"])
    printed = capsys.readouterr().out
    path = recipe_folder() / "quickstart.yaml"
    assert printed == f"{path}\n\n{path.read_text()}\n"


def test_recipes_copy_puts_one_here_and_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", "neural_collapse/theory"])
    assert Path("theory.yaml").read_text() == (recipe_folder() / "neural_collapse/theory.yaml").read_text()
    assert "lightning-feat fit --config theory.yaml" in capsys.readouterr().out
    Path("theory.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=r"theory\.yaml is here already"):
        main(["recipes", "copy", "neural_collapse/theory"])
    assert Path("theory.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["show", "quickstrat"], "no recipe 'quickstrat'; nearest: quickstart"),
        (["show"], "`recipes show NAME`"),
        (["paste", "quickstart"], "`recipes show NAME`"),
    ],
)
def test_recipes_that_are_not_known_are_answered(arguments, answer):
    with pytest.raises(SystemExit, match=answer):
        main(["recipes", *arguments])


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-feat {version('lightning-feat')}\n"
