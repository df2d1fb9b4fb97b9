"""Eigenpairs, traces and spectral densities of a symmetric operator that is known by its products alone."""

from curvopt.linalg.density import SpectralDensity as SpectralDensity
from curvopt.linalg.density import spectral_density as spectral_density
from curvopt.linalg.eigsh import eigsh as eigsh
from curvopt.linalg.result import EigenResult as EigenResult
from curvopt.linalg.result import Estimate as Estimate
from curvopt.linalg.ritz import PowerImage as PowerImage
from curvopt.linalg.ritz import power_image as power_image
from curvopt.linalg.trace import squared_frobenius as squared_frobenius
from curvopt.linalg.trace import trace as trace
