"""What is shown to others: pages, records of experiments, galleries, and reports."""
