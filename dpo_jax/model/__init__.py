"""The Llama model, in Flax Linen."""
