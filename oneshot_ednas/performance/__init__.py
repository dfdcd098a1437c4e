"""The benchmark: what a search costs, as ratios that are measured side by side in one process."""
