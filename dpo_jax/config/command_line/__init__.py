"""What the command line makes of options: its words, their help, what a shell completes; CONFIG files."""
