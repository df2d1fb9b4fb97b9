"""Studies: what a paper claims, re-run by one command; one module here and one file in ``configs/study`` each."""

from benchmarks.studies.base import Lab as Lab
from benchmarks.studies.base import Outcome as Outcome
from benchmarks.studies.base import Part as Part
from benchmarks.studies.base import PartResult as PartResult
from benchmarks.studies.base import Study as Study
from benchmarks.studies.base import Value as Value
from benchmarks.studies.base import all_studies as all_studies
from benchmarks.studies.base import register as register

__all__ = ["Lab", "Outcome", "Part", "PartResult", "Study", "Value", "all_studies", "register"]
