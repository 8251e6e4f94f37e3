"""Figures out of rows of numbers, and the pages that show them. No model works here."""
