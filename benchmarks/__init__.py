"""Benchmarks of xipvm against its peers; ``python -m benchmarks`` runs them. See README.md."""
