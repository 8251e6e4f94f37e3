"""What stands in a run folder: its marker and options, metrics and notes, results row by row, stages."""
