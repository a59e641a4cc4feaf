"""Looking at runs side by side: one HTML page that needs nothing else."""
