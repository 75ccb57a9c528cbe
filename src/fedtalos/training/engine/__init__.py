"""Training steps of V clients in one stack: batched products, one optimiser, one CUDA graph where there is CUDA."""
