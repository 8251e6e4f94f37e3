"""Chains of commands, each stage of which can be interrupted and gone on with. One file a recipe."""
