"""Loss scaling: the optimizer, the `GradScaler` and the parts that both are made of."""
