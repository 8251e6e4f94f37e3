"""Everything that judges what was written; here the models among them: their weights, log-probabilities, scores."""
