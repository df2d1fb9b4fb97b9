"""How a run is done: data order, training loop, measurements, checkpoints."""
