"""Side-by-side benchmarks: one file per question, each run pairs ours with another implementation at the same weights."""
