"""What a model's inputs look like: token sources, statistics of activations, and the walk from block to block."""
