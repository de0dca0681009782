"""Search for generation strategies, and for the training that goes with them."""
