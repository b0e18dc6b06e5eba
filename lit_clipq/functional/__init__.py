"""Pure tensor functions: grids, ranges, distances. They import torch and nothing of this project."""
