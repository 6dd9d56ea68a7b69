"""What a study can tune, one kind a file."""
