"""Shared by several commands: options, how a command runs and ends, tables."""
