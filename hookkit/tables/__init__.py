"""What a run shows, as pandas tables: ranks, shifts, uncertainty, surprisal, decoding; and metrics."""
