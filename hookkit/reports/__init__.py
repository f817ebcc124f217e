"""Pages, records of experiments, galleries of results, and reports on edits and models."""
