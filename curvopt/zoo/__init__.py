"""Every optimizer, ours and others', under one name, with its facts and its search space."""

from curvopt.zoo import kozistr as kozistr
from curvopt.zoo import ours as ours
from curvopt.zoo import schedule_free as schedule_free
from curvopt.zoo import third_party as third_party
from curvopt.zoo import torch_optim as torch_optim
from curvopt.zoo.registry import Choice as Choice
from curvopt.zoo.registry import Entry as Entry
from curvopt.zoo.registry import Range as Range
from curvopt.zoo.registry import UnavailableOptimizerError as UnavailableOptimizerError
from curvopt.zoo.registry import UnknownOptimizerError as UnknownOptimizerError
from curvopt.zoo.registry import create as create
from curvopt.zoo.registry import describe as describe
from curvopt.zoo.registry import names as names
from curvopt.zoo.registry import search_space as search_space

__all__ = [
    "Choice",
    "Entry",
    "Range",
    "UnavailableOptimizerError",
    "UnknownOptimizerError",
    "create",
    "describe",
    "names",
    "search_space",
]
