"""Bytes: HTTP, retries, codecs, futures and the order of requests."""
