"""NOR flash: cells, chips and command sets."""
