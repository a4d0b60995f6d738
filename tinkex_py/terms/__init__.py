"""Building blocks of the ready-made regularizers and base losses."""
