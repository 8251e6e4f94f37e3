"""Whether what is kept is whole, and still what was written: folders, checksums, hashes of arrays, the base model."""
