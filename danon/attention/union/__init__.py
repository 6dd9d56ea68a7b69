"""One softmax over several branches of keys."""
