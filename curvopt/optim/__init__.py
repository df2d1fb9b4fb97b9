"""torch.optim.Optimizer subclasses that split gradient or update into dominant and bulk parts."""

from curvopt.optim.lbfgs import SubspaceLBFGS as SubspaceLBFGS
from curvopt.optim.sgd import BulkSGD as BulkSGD
from curvopt.optim.sgd import DomSGD as DomSGD
from curvopt.optim.sgd import GGNProjectedSGD as GGNProjectedSGD
from curvopt.optim.sgd import InterpolatedSGD as InterpolatedSGD
from curvopt.optim.sgd import SubspaceSGD as SubspaceSGD
from curvopt.optim.wrapper import SubspaceScaled as SubspaceScaled

__all__ = ["BulkSGD", "DomSGD", "GGNProjectedSGD", "InterpolatedSGD", "SubspaceLBFGS", "SubspaceSGD", "SubspaceScaled"]
