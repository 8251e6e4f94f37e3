"""Our own arrays on a disk: a run's checkpoints, and what `convert` wrote."""
