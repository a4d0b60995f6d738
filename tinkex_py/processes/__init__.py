"""Worker processes that can be killed: a bounded pool, and what crosses to them and back. Knows nothing of losses."""
