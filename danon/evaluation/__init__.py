"""Models that attentions are put in to be judged."""
