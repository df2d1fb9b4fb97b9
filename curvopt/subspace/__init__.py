"""The cached dominant subspace: what it is and when it is refreshed."""

from curvopt.subspace.dominant import DominantSubspace as DominantSubspace
from curvopt.subspace.solve import RefreshReport as RefreshReport

__all__ = ["DominantSubspace", "RefreshReport"]
