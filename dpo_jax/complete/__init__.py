"""Everything that lets a model write."""
