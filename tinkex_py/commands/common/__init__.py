"""What several commands share: options, outcomes, running, tables."""
