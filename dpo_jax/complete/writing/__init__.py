"""Models of this machine that write into files, which can be gone on with."""
