"""The search for the best range: its definition, its compiled loops, and `best.best_range` to choose between them."""
