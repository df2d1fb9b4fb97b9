"""What a run's curvature did: measurements beside the optimizers, never inside them.

Every one of them takes any model, loss and loop, leaves no trace on the training, and says what it cost.
"""

from curvopt.diagnostics.alignment import EffectiveRates as EffectiveRates
from curvopt.diagnostics.alignment import GradientAlignment as GradientAlignment
from curvopt.diagnostics.alignment import HaarShare as HaarShare
from curvopt.diagnostics.alignment import Mean as Mean
from curvopt.diagnostics.alignment import dominant_share as dominant_share
from curvopt.diagnostics.alignment import effective_learning_rates as effective_learning_rates
from curvopt.diagnostics.alignment import gradient_alignment as gradient_alignment
from curvopt.diagnostics.alignment import haar_share as haar_share
from curvopt.diagnostics.connectivity import FlatDirections as FlatDirections
from curvopt.diagnostics.connectivity import LossPath as LossPath
from curvopt.diagnostics.connectivity import LossProfile as LossProfile
from curvopt.diagnostics.connectivity import flat_directions as flat_directions
from curvopt.diagnostics.connectivity import flatten_weights as flatten_weights
from curvopt.diagnostics.connectivity import loss_along as loss_along
from curvopt.diagnostics.connectivity import loss_path as loss_path
from curvopt.diagnostics.displacement import Displacement as Displacement
from curvopt.diagnostics.displacement import TwoTime as TwoTime
from curvopt.diagnostics.displacement import principal_angles as principal_angles
from curvopt.diagnostics.displacement import subspace_overlap as subspace_overlap
from curvopt.diagnostics.displacement import vector_overlaps as vector_overlaps
from curvopt.diagnostics.edge import EdgeRule as EdgeRule
from curvopt.diagnostics.edge import edge_rule as edge_rule
from curvopt.diagnostics.edge import last_significant_gap as last_significant_gap
from curvopt.diagnostics.edge import numerical_rank as numerical_rank
from curvopt.diagnostics.energy import CurvatureEnergy as CurvatureEnergy
from curvopt.diagnostics.energy import curvature_energy as curvature_energy
from curvopt.diagnostics.localization import LayerLocalization as LayerLocalization
from curvopt.diagnostics.localization import Localization as Localization
from curvopt.diagnostics.localization import NullIPR as NullIPR
from curvopt.diagnostics.localization import gaussian_ipr as gaussian_ipr
from curvopt.diagnostics.localization import haar_ipr as haar_ipr
from curvopt.diagnostics.localization import localization as localization
from curvopt.diagnostics.localization import participation_ratio as participation_ratio
from curvopt.diagnostics.localization import reinitialized_bases as reinitialized_bases
from curvopt.diagnostics.localization import reinitialized_ipr as reinitialized_ipr
from curvopt.diagnostics.moment import MomentSpectrum as MomentSpectrum
from curvopt.diagnostics.moment import moment_spectrum as moment_spectrum
from curvopt.diagnostics.outliers import OutlierCount as OutlierCount
from curvopt.diagnostics.outliers import Outliers as Outliers
from curvopt.diagnostics.outliers import count_outliers as count_outliers
from curvopt.diagnostics.outliers import layer_outliers as layer_outliers
from curvopt.diagnostics.outliers import outliers as outliers
from curvopt.diagnostics.outliers import split_data as split_data
from curvopt.diagnostics.probe import Probe as Probe
from curvopt.diagnostics.probe import ProbeCost as ProbeCost
from curvopt.diagnostics.probe import ProbeWarning as ProbeWarning
from curvopt.diagnostics.sharpness import Sharpness as Sharpness
from curvopt.diagnostics.sharpness import batch_sharpness as batch_sharpness
from curvopt.diagnostics.sharpness import group_threshold as group_threshold
from curvopt.diagnostics.sharpness import preconditioner as preconditioner
from curvopt.diagnostics.sharpness import sharpness as sharpness
from curvopt.diagnostics.sharpness import small_batch_threshold as small_batch_threshold
from curvopt.diagnostics.table import Table as Table
