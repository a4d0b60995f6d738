"""Training runs: a loop, the folder it writes, and what is drawn from it."""
