"""Replaying scenarios that were recorded on Linux with KVM, and comparing what the model does with what Linux did."""
