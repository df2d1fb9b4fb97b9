"""Rivals of SubspaceLBFGS on full-batch problems, written as their papers have them."""

from curvopt.zoo.rivals.bfgs import BFGS as BFGS

__all__ = ["BFGS"]
