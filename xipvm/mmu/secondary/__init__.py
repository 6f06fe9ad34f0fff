"""Secondary MMUs: what caches translations of the primary one and must be told when they change."""
