"""Float32 islands: which layers compute in float32, and how a built model is rewritten."""
