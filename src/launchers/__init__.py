"""Where the jobs of a sweep run. A launcher is given prepared directories; what happens in one, the job itself decides."""
