"""Each mechanism written straight from its definition: dense, float64, short."""
