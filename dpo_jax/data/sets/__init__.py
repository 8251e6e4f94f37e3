"""Tokenised data sets, and their batches, step by step."""
