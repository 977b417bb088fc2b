from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import filter as matching

from lightning_feat.functional.neural_collapse import known_measures

LAYER_RATIO = "nc1_layer_ratio"  # of two layers, which no function of one layer's sums can give
DEFAULT_MEASURES = (
    LAYER_RATIO,
    *("nc0", "nc1_pinv_over_k", "nc1_quotient", "cdnv", "vci", "nc2_equinorm", "nc2_equiangularity", "nc2_etf_error"),
    *("nc2_subspace_*", "nc3", "nc3_subspace_angle", "nc4_mismatch", "ncc_accuracy"),
)


class MeasurePatterns:
    """Which measures are logged, by patterns of their names; a pattern without effect is said.

    Args:
        measures: the patterns; None for one or two measures of each kind.

    Raises:
        ValueError: if a pattern matches no measure there is.
    """

    def __init__(self, measures: list[str] | None) -> None:
        known = [*known_measures(), LAYER_RATIO]
        for pattern in measures or ():
            if not matching(known, pattern):
                near = get_close_matches(pattern, known, n=3, cutoff=0.3) or sorted(known)
                raise ValueError(f"measures={measures}: {pattern!r} matches no measure; nearest: {', '.join(near)}.")
        self.patterns = DEFAULT_MEASURES if measures is None else tuple(measures)
        self._asked = measures or []
        self._given: set[str] = set()

    def begin(self) -> None:
        """Begin a run."""
        self._given = set()

    def choose(self, names: Iterable[str]) -> set[str]:
        """Those of the measures of a layer that are to be logged."""
        names = [*names]
        self._given.update(names)
        return {name for pattern in self.patterns for name in matching(names, pattern)}

    def never_given(self) -> str:
        """A sentence about patterns that no layer has given a measure for, once something was measured; or nothing."""
        lost = sorted(pattern for pattern in self._asked if not matching(self._given, pattern))
        if not self._given or not lost:
            return ""
        return (
            f"measures={lost}: no layer that is watched gives such a measure. nc4_mismatch and ncc_accuracy need "
            "mode='exact', nc1_pinv there or second_moment=True, nc0 and nc3 the layer that feeds the classifier, "
            f"subspace measures a GrassmannLinear, {LAYER_RATIO} several layers."
        )
