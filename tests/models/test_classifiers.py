"""What is found in the models of timm, torchvision and transformers is what the table of expected answers says."""

import pytest

from tests.models.answers import answer
from tests.models.libraries import LIBRARIES, by_family, one_of_each
from tests.models.sweep import PAGE, expected, page, ran_on


def models_of(library):
    pytest.importorskip(library.partition(",")[0])
    return LIBRARIES[library]()


def one_of_each_answer(library):
    """Families, no two of which have the same answer."""
    shown = {}
    for family, answers in expected()[library].items():
        if not answers[0].startswith("not built"):
            shown.setdefault(answers[0], family)
    return list(shown.values())


def check(library, model, run):
    said = answer(model, run)
    answers = expected()[library][model.family]
    names = {known.partition(", made by")[0] for known in answers}  # by name alone, running says no more
    assert said in (answers if run else names), f"{library} {model.name} ({model.family})"


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_family_stands_in_the_table(library):
    unknown = set(by_family(models_of(library))) - set(expected()[library])
    assert not unknown, f"new in {library}: look at what is found in them, by `make sweep`, and add it to the table"


@pytest.mark.parametrize(
    ("library", "family"), [(library, family) for library in LIBRARIES for family in one_of_each_answer(library)]
)
def test_one_model_for_each_answer(library, family):
    models = one_of_each([model for model in models_of(library) if model.family == family])
    if not models:
        pytest.skip(f"this {library} has no {family}")
    check(library, models[0], run=False)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_one_model_of_each_family_by_running_too(library):
    for model in one_of_each(models_of(library)):
        check(library, model, run=True)


def test_the_page_is_what_the_sweep_wrote():
    assert PAGE.read_text() == page(expected(), ran_on())
