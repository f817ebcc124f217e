"""Tables of runs, as DataFrames: ranks, shifts, uncertainty, surprisal, decoding, metrics."""
