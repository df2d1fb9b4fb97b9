"""The named errors and warnings of curvopt: catch these, not message texts."""

import sys
import warnings


class CurvoptError(Exception):
    """Base of every error that curvopt raises by a name of its own."""


class CurvatureError(CurvoptError, RuntimeError):
    """A curvature product can't be computed; the text names the cause and the way out."""


class DoubleBackwardError(CurvatureError):
    """An operation in the model or the loss has no (right) second derivative."""


class NondeterministicClosureError(CurvatureError):
    """Two calls of a closure at the same weights gave different losses or gradients."""


class NonFiniteError(CurvoptError, FloatingPointError):
    """NaN or Inf where training can't go on (five refused steps in a row, a NaN curvature product)."""


class EmptyDataError(CurvoptError, ValueError):
    """The curvature data hold no batch, or a batch holds no example."""


class MissingExtraError(CurvoptError, ImportError):
    """An optional dependency is absent; the text names the extra that brings it."""


class CurvoptWarning(UserWarning):
    """Base of every warning of curvopt."""


class RefreshWarning(CurvoptWarning):
    """A refresh failed or ended unconverged; the previous basis stays in use or the best one found is used."""


class GapWarning(CurvoptWarning):
    """The rank sits where the spectrum has no gap, so the subspace is not well determined."""


class RankWarning(CurvoptWarning):
    """The rank could not be inferred from the loss, or fewer positive eigenvalues exist than asked for."""


class NonFiniteWarning(CurvoptWarning):
    """A step with NaN or Inf gradients was refused; parameters, buffers and basis stay as they were."""


class CurvatureModeWarning(CurvoptWarning):
    """The matrix measured may not be the one meant (BatchNorm in training mode over several batches)."""


class OverheadWarning(CurvoptWarning):
    """The projection alone costs more than the overhead that was allowed."""


class LineSearchWarning(CurvoptWarning):
    """A line search failed or a direction did not descend; the parameters are at the last accepted iterate."""


class LearningRateWarning(CurvoptWarning):
    """Every learning rate is 0 while a rule needs one: the basis is kept and the rule skipped."""


def warn(message: str, category: type[CurvoptWarning]) -> None:
    """Warn at the line of the user's code that led here, past the frames of curvopt and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("curvopt", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
