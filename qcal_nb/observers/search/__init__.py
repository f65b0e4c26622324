"""The search for the range that loses least: its definition, its compiled loops, and the door to both, `best.best_range`."""
