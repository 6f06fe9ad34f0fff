"""Executes guest ELF binaries in place from emulated flash, through a secondary MMU kept coherent by MMU notifiers."""
