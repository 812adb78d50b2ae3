"""Float32 islands: plans, rewrites of built layers, and promotion of outputs."""
