"""Curvature as symmetric operators: what is multiplied, never how its eigenvectors are found."""

from curvopt.curvature.class_directions import class_directions as class_directions
from curvopt.curvature.closure import ClosureHessian as ClosureHessian
from curvopt.curvature.cost import Cost as Cost
from curvopt.curvature.dense import DenseOperator as DenseOperator
from curvopt.curvature.dense import DiagonalOperator as DiagonalOperator
from curvopt.curvature.dense import PlantedSpectrum as PlantedSpectrum
from curvopt.curvature.functional import FunctionalHessian as FunctionalHessian
from curvopt.curvature.ggn import GGN as GGN
from curvopt.curvature.hessian import Hessian as Hessian
from curvopt.curvature.operator import SymmetricOperator as SymmetricOperator
from curvopt.curvature.problem import Problem as Problem
from curvopt.curvature.second_moment import GradientSecondMoment as GradientSecondMoment

__all__ = [
    "GGN",
    "ClosureHessian",
    "Cost",
    "DenseOperator",
    "DiagonalOperator",
    "FunctionalHessian",
    "GradientSecondMoment",
    "Hessian",
    "PlantedSpectrum",
    "Problem",
    "SymmetricOperator",
    "class_directions",
]
