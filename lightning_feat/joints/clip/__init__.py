"""Find the towers of a CLIP-like model, and change what passes through them."""
