"""XPMEM between processes: what an owner and its remote nodes say to each other, and how it gets there.

The owner's side, which pins pages and recalls them, is :mod:`xipvm.mmu.secondary.xpmem`. Here are the messages
(wire.py), the two ways they travel (link.py: between actors of one program; sockets.py: between processes), the remote
node (node.py), and what serves a machine's segments on a socket while its guest runs (export.py).
"""
