"""The primary MMU: frames, page tables, VMAs, faults, and what changes them."""
