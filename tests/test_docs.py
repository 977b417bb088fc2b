"""What the pages of docs/ promise: nothing public is left out, all can be reached, numbers are those of the READMEs.

The code blocks of the pages are run by tests/recipes/test_readmes.py, links are followed by `make docs`.
"""

import ast
import re
from pathlib import Path

import pytest

import lightning_feat  # which imports nothing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CARDS = sorted({*(DOCS / "cards").glob("*.md")} - {DOCS / "cards" / "index.md"})
READMES = sorted((ROOT / "recipes").glob("*/README.md"))
PACKAGE = ROOT / "lightning_feat"
ROOMS = ("callbacks", "mixins", "metrics", "layers", "optim", "manifolds", "data", "compare", "report", "doctor")
# A difference with its interval, or a mean with its deviation.
MEASURED = re.compile(r"[-+]?\d+\.\d+ (?:\[[-+\d., ]+\]|± \d+\.\d+)")


def public(room: str) -> list[str] | None:
    """The names that a room lists, read without importing torch; None if it lists none."""
    tree = ast.parse((PACKAGE / room.replace(".", "/") / "__init__.py").read_text())
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    return ast.literal_eval(lists[0]) if lists else None


def toctree(page: Path) -> list[Path]:
    """The pages that a page puts under itself, each with its toctree."""
    found = [page]
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                path = re.sub(r"^.*<(.*)>$", r"\1", line)  # of "title <path>"
                found += toctree((page.parent / f"{path}.md").resolve())
    return found


def test_every_page_is_in_the_navigation_once():
    listed = toctree(DOCS / "index.md")
    assert sorted(listed) == sorted({*PAGES, *READMES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"})


@pytest.mark.parametrize("name", public("callbacks"))
def test_public_callback_is_named_on_a_page_that_was_written_for_it(name):
    written = [page for page in PAGES if page.name not in ("compatibility.md", "performance.md", "models.md")]
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in written)


@pytest.mark.parametrize(
    "room", [*ROOMS, *(f"functional.{path.parent.name}" for path in (PACKAGE / "functional").glob("*/__init__.py"))]
)
def test_room_with_public_names_is_in_the_reference(room):
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert (f".. automodule:: lightning_feat.{room}\n" in reference) == (public(room) is not None)


def test_every_figure_is_in_the_gallery():
    figures = {path.resolve() for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.png")}
    gallery = DOCS / "about" / "gallery.md"
    shown = {(gallery.parent / path).resolve() for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", gallery.read_text())}
    assert shown == figures


@pytest.mark.parametrize("page", CARDS, ids=lambda page: page.stem)
def test_card_has_its_parts_and_begins_with_its_verdict(page):
    text = page.read_text()
    assert re.match(r"# [^\n]+\n\n> \*\*Verdict\.\*\* ", text)
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == [
        "What they do" if "What they do" in text else "What it does",
        "When they pay, and when not" if "When they pay" in text else "When it pays, and when not",
        "What we measured",
        "Formula",
        "Cost",
        "Use",
    ]
    assert "../../recipes/" in text.rpartition("## Use")[2], "a card ends with a link to the long tables"


@pytest.mark.parametrize("page", [DOCS / "index.md", *CARDS, DOCS / "cards" / "index.md"])
def test_measured_numbers_of_a_card_are_those_of_a_readme(page):
    sources = "".join(path.read_text() for path in [ROOT / "README.md", *READMES])
    text = page.read_text()
    assert [number for number in MEASURED.findall(text) if number not in sources] == []


def test_citation_states_the_version():
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert version is not None
    assert version[1] == lightning_feat.__version__
    assert f"{{{version[1]}}}" in (DOCS / "about" / "citation.md").read_text()
