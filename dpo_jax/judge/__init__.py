"""Everything that judges what was written: reward functions and models, policies, and figures of their verdicts."""
