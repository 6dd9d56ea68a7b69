"""What lies on disk: cases, results, run folders."""
