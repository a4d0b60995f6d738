"""What the ready-made regularizers and base losses are built from."""
