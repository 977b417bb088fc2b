from lightning_feat.doctor import Finding, as_text
from lightning_feat.doctor.finding import in_order


def test_errors_come_first_and_each_finding_once():
    note, error, warning = (Finding(severity, "check", "there", "this.") for severity in ("note", "error", "warning"))
    assert in_order([note, error, note, warning, error]) == [error, warning, note]


def test_text_tells_what_why_and_what_to_do():
    text = as_text([Finding("error", "check", "Monitor[x]", "it is wrong.", "It matters.", "Change it.")])
    lines = text.splitlines()
    assert lines[:4] == ["error: Monitor[x] (check)", "  it is wrong.", "  why: It matters.", "  do: Change it."]
    assert lines[-1] == "1 error, 0 warnings, 0 notes."


def test_text_is_wrapped():
    assert max(map(len, as_text([Finding("error", "check", "x", "word " * 60)]).splitlines())) <= 100
