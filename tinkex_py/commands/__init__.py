"""Commands of the command line, each in the file of its name.

A command reads its options, calls the library and prints. Shells import these files at every press of the tab key, so
heavy imports stand inside functions. `common` holds what several commands share.
"""
