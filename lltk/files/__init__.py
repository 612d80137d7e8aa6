"""Files: written whole, checked as they are read, and never taken from someone else."""
