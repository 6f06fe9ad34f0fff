"""XPMEM between processes: what an owner and its remote nodes say to each other, and how it gets there.

The owner's side, which pins pages and recalls them, is :mod:`xipvm.mmu.secondary.xpmem`. Here are the messages
(wire.py), the two ways they travel (link.py: between actors of one program; sockets.py: between processes), and the
remote node (node.py). What serves a machine's segments while its guest runs is :mod:`xipvm.export`.

Messages and links know of no memory management: the owner's side imports them, not they it.
"""
