"""Known faults that can be put into the system by name, to show that they are found."""

from xipvm.mutants import kvm as _kvm
from xipvm.mutants.mutant import MUTANTS, Mutant, get, planted

__all__ = ["MUTANTS", "Mutant", "get", "planted"]
del _kvm
