"""curvopt: optimizers that split every update between the curvature's dominant subspace and the bulk.

Optimizers
    BulkSGD, DomSGD, InterpolatedSGD, GGNProjectedSGD    torch.optim.SGD with its displacement split
    SubspaceScaled                                       the same around any torch optimizer
    SubspaceLBFGS                                        L-BFGS started from the cached eigenpairs, for high precision
Curvature operators
    Hessian, GGN, FunctionalHessian, GradientSecondMoment, ClosureHessian
Measurements
    eigsh, trace, squared_frobenius, spectral_density, curvature_energy
The cached state
    DominantSubspace
Every optimizer under one name
    zoo.create, zoo.names, zoo.describe, zoo.search_space
"""

from curvopt import diagnostics as diagnostics
from curvopt import zoo as zoo
from curvopt._errors import CurvatureError as CurvatureError
from curvopt._errors import CurvatureModeWarning as CurvatureModeWarning
from curvopt._errors import CurvoptError as CurvoptError
from curvopt._errors import CurvoptWarning as CurvoptWarning
from curvopt._errors import DoubleBackwardError as DoubleBackwardError
from curvopt._errors import EmptyDataError as EmptyDataError
from curvopt._errors import GapWarning as GapWarning
from curvopt._errors import LineSearchWarning as LineSearchWarning
from curvopt._errors import MissingExtraError as MissingExtraError
from curvopt._errors import NondeterministicClosureError as NondeterministicClosureError
from curvopt._errors import NonFiniteError as NonFiniteError
from curvopt._errors import NonFiniteWarning as NonFiniteWarning
from curvopt._errors import OverheadWarning as OverheadWarning
from curvopt._errors import RankWarning as RankWarning
from curvopt._errors import RefreshWarning as RefreshWarning
from curvopt.curvature import GGN as GGN
from curvopt.curvature import ClosureHessian as ClosureHessian
from curvopt.curvature import FunctionalHessian as FunctionalHessian
from curvopt.curvature import GradientSecondMoment as GradientSecondMoment
from curvopt.curvature import Hessian as Hessian
from curvopt.diagnostics import curvature_energy as curvature_energy
from curvopt.linalg import eigsh as eigsh
from curvopt.linalg import spectral_density as spectral_density
from curvopt.linalg import squared_frobenius as squared_frobenius
from curvopt.linalg import trace as trace
from curvopt.optim import BulkSGD as BulkSGD
from curvopt.optim import DomSGD as DomSGD
from curvopt.optim import GGNProjectedSGD as GGNProjectedSGD
from curvopt.optim import InterpolatedSGD as InterpolatedSGD
from curvopt.optim import SubspaceLBFGS as SubspaceLBFGS
from curvopt.optim import SubspaceScaled as SubspaceScaled
from curvopt.subspace import DominantSubspace as DominantSubspace

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "BulkSGD",
    "ClosureHessian",
    "CurvatureError",
    "CurvatureModeWarning",
    "CurvoptError",
    "CurvoptWarning",
    "DomSGD",
    "DominantSubspace",
    "DoubleBackwardError",
    "EmptyDataError",
    "FunctionalHessian",
    "GGNProjectedSGD",
    "GapWarning",
    "GradientSecondMoment",
    "Hessian",
    "InterpolatedSGD",
    "LineSearchWarning",
    "MissingExtraError",
    "NonFiniteError",
    "NonFiniteWarning",
    "NondeterministicClosureError",
    "OverheadWarning",
    "RankWarning",
    "RefreshWarning",
    "SubspaceLBFGS",
    "SubspaceScaled",
    "curvature_energy",
    "diagnostics",
    "eigsh",
    "spectral_density",
    "squared_frobenius",
    "trace",
    "zoo",
]
