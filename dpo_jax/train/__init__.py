"""The session of a training command: loop, log, held-out figures, FLOPs and cost, rollouts."""
