"""Known faults that can be put into the system by name, to show that they are found."""

from xipvm.mutants import cpu as _cpu
from xipvm.mutants import dax as _dax
from xipvm.mutants import dmirror as _dmirror
from xipvm.mutants import freeze as _freeze
from xipvm.mutants import gru as _gru
from xipvm.mutants import intervals as _intervals
from xipvm.mutants import kvm as _kvm
from xipvm.mutants import kvm_dirty as _kvm_dirty
from xipvm.mutants import mirrors as _mirrors
from xipvm.mutants import mm as _mm
from xipvm.mutants import notifier as _notifier
from xipvm.mutants import odp as _odp
from xipvm.mutants import pfncache as _pfncache
from xipvm.mutants import protocol_2008 as _protocol_2008
from xipvm.mutants import shadow as _shadow
from xipvm.mutants import sva as _sva
from xipvm.mutants import xip as _xip
from xipvm.mutants import xpmem as _xpmem
from xipvm.mutants.mutant import MUTANTS, Mutant, get, planted

__all__ = ["MUTANTS", "Mutant", "get", "planted"]
del (
    _cpu,
    _dax,
    _dmirror,
    _freeze,
    _gru,
    _intervals,
    _kvm,
    _kvm_dirty,
    _mirrors,
    _mm,
    _notifier,
    _odp,
    _pfncache,
    _protocol_2008,
    _shadow,
    _sva,
    _xip,
    _xpmem,
)
