"""Work spread over the machines of a Ray cluster, one case at a time on each."""
