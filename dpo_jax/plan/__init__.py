"""The planner: compile a training step for devices that are not here, and say what it needs there."""
