"""At home where its users work: parts that join this package to others. Each needs an extra of its name."""
