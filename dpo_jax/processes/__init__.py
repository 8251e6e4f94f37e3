"""Several processes, one run: joined, and watching each other."""
