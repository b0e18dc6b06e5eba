"""From what a layer saw to the grids it takes: candidates, losses, sampling, selection, one layer's search."""
