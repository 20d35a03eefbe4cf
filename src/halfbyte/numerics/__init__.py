"""Pure mathematics on tensors: grids, range searches, quantized weights, error measures. Knows torch and the scheme."""
