"""Eigenpairs, traces and spectral densities of a symmetric operator that is known by its products alone."""

from curvopt.linalg.eigsh import eigsh as eigsh
from curvopt.linalg.result import EigenResult as EigenResult
from curvopt.linalg.result import Estimate as Estimate
from curvopt.linalg.ritz import PowerImage as PowerImage
from curvopt.linalg.ritz import power_image as power_image
