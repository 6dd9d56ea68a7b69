"""Work on the machines of a Ray cluster, one job at a time on each."""
