"""At home where users work: each part needs an extra of its own, and is imported by its name."""
