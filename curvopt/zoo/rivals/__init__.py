"""Rivals of SubspaceLBFGS on full-batch problems, written as their papers have them."""

from curvopt.zoo.rivals.bfgs import BFGS as BFGS
from curvopt.zoo.rivals.levenberg import LevenbergMarquardt as LevenbergMarquardt
from curvopt.zoo.rivals.nncg import NystromNewtonCG as NystromNewtonCG

__all__ = ["BFGS", "LevenbergMarquardt", "NystromNewtonCG"]
