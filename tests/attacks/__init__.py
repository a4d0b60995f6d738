"""The CPU time of everything that reads bytes of others, as their number grows: `make attacks`."""
