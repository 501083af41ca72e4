"""Side-by-side benchmarks, one file per question: ours and another implementation at the same weights, in one run."""
