"""Rivals of our optimizers, written as their papers have them: full-batch methods, and first-order ones that split steps."""

from curvopt.zoo.rivals.bfgs import BFGS as BFGS
from curvopt.zoo.rivals.eigen_sam import EigenSAM as EigenSAM
from curvopt.zoo.rivals.ire import IRE as IRE
from curvopt.zoo.rivals.levenberg import LevenbergMarquardt as LevenbergMarquardt
from curvopt.zoo.rivals.nncg import NystromNewtonCG as NystromNewtonCG

__all__ = ["BFGS", "IRE", "EigenSAM", "LevenbergMarquardt", "NystromNewtonCG"]
