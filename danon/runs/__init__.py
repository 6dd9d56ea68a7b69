"""Files of results: cases, runs, saved models, exports, and their locks."""
