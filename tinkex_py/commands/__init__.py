"""Commands of the command line, each in the file of its name.

A command reads its options, calls the library and prints; shells ask for names at every press of the tab key, so what
is heavy is imported inside of it. `common` is what several commands share; `work` is what some of them do.
"""
