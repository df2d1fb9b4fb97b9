"""What a run's curvature did: measurements beside the optimizers, never inside them."""

from curvopt.diagnostics.energy import CurvatureEnergy as CurvatureEnergy
from curvopt.diagnostics.energy import curvature_energy as curvature_energy

__all__ = ["CurvatureEnergy", "curvature_energy"]
