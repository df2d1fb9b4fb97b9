"""Differential equations, their exact solutions, and networks whose derivatives are carried forward by hand."""

from benchmarks.physics.equations import EQUATIONS as EQUATIONS
from benchmarks.physics.equations import Equation as Equation
from benchmarks.physics.network import Jet as Jet
from benchmarks.physics.network import JetMLP as JetMLP

__all__ = ["EQUATIONS", "Equation", "Jet", "JetMLP"]
