"""Measures this package, side by side with the official SDK, plain torch and plain peft: `python -m benchmarks`.

Every client runs in a process of its own (`subject_process`), against a service that answers at once
(`replay_service`) or the embedded one. docs/performance.md says how to read what comes out.
"""
