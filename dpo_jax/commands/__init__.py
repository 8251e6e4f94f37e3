"""One file for each word of the command line: reads options, calls, says what came out."""
