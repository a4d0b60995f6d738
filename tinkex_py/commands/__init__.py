"""Commands of the command line, one file per group. What is heavy is imported inside of them: shells ask for names."""
