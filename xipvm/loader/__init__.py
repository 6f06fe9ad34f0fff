"""Guest images: reading ELF files and placing them in flash and RAM."""

from xipvm.loader.elf import ElfImage, Segment, Symbol
from xipvm.loader.place import Piece, Placement, board_for, place

__all__ = ["ElfImage", "Piece", "Placement", "Segment", "Symbol", "board_for", "place"]
