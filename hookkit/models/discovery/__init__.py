"""Discovery: finding the sites of a model that is not in the table of families, by a dry run."""
