"""Graph models: layers, pooling and transforms for graphs given as PyTorch Geometric gives them."""
