"""The vCPU: engine, exits, clocks, and one module an ISA."""
