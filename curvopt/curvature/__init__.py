"""Curvature as symmetric operators: what is multiplied, never how its eigenvectors are found."""

from curvopt.curvature.closure import ClosureHessian as ClosureHessian
from curvopt.curvature.dense import DenseOperator as DenseOperator
from curvopt.curvature.dense import DiagonalOperator as DiagonalOperator
from curvopt.curvature.dense import PlantedSpectrum as PlantedSpectrum
from curvopt.curvature.hessian import Hessian as Hessian
from curvopt.curvature.operator import SymmetricOperator as SymmetricOperator
from curvopt.curvature.problem import Problem as Problem

__all__ = [
    "ClosureHessian",
    "DenseOperator",
    "DiagonalOperator",
    "Hessian",
    "PlantedSpectrum",
    "Problem",
    "SymmetricOperator",
]
