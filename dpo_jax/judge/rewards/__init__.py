"""Reward functions: prompts and responses in, a number for each response out; and what is chosen by it."""
