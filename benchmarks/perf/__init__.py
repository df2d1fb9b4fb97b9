"""What curvature costs: products, eigenpairs, refreshes and steps, ours beside the peers', in units of one gradient."""
