"""Options of the training commands, and of the steps that they take."""
