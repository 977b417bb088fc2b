#!/usr/bin/env bash
# A string that an argument `Callable | str` accepts is written into the configuration as another string, which reads back as valid.
#
# jsonargparse 4.53.0. Arguments are annotated by a union of a function and a string, in either order; ":2" is parsed, dumped and parsed again.
# Guessed: the order of a union of types matters for how ambiguous values are parsed, and not for how a parsed value is written.
# Seen: with the function first the value is parsed as ":2", dumped as "Unable to serialize instance :2", with a warning, and that text is
# accepted when the configuration is read again. With the string first it comes back as it was. In a mapping it is the same; with
# `Callable | int` the number 3 is dumped as such a text, which is then refused.
#
# Prints:
#   function first ':2' -> ':2' -> 'Unable to serialize instance :2'
#   string first ':2' -> ':2' -> ':2'
#   in a mapping {'a': ':2'} -> {'a': ':2'} -> {'a': 'Unable to serialize instance :2'}
#   number {'a': 3} -> {'a': 3} -> refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet jsonargparse==4.53.0 PyYAML
cd "$folder"
cat > run.py <<'PYTHON'
import contextlib
import io
import warnings
from collections.abc import Callable, Mapping

from jsonargparse import ArgumentParser

warnings.filterwarnings("ignore")
CASES = {
    "function first": (Callable[[int], int] | str, ":2"),
    "string first": (str | Callable[[int], int], ":2"),
    "in a mapping": (Mapping[str, Callable[[int], int] | str], {"a": ":2"}),
    "number": (Mapping[str, Callable[[int], int] | int], {"a": 3}),
}
for name, (hint, value) in CASES.items():
    parser = ArgumentParser()
    parser.add_argument("--block", type=hint)
    parsed = parser.parse_object({"block": value})
    dumped = parser.dump(parsed)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            again = repr(parser.parse_string(dumped).block)
    except SystemExit:
        again = "refused"
    print(name, repr(value), "->", repr(parsed.block), "->", again)
PYTHON
"$folder/env/bin/python" run.py > seen.txt
cat seen.txt
cat > expected.txt <<'TEXT'
function first ':2' -> ':2' -> 'Unable to serialize instance :2'
string first ':2' -> ':2' -> ':2'
in a mapping {'a': ':2'} -> {'a': ':2'} -> {'a': 'Unable to serialize instance :2'}
number {'a': 3} -> {'a': 3} -> refused
TEXT
diff expected.txt seen.txt
