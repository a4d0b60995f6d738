"""A small training service over HTTP: start a job, follow it, cancel it, fetch its result."""
