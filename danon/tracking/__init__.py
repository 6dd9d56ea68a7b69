"""Recording of runs, models and figures in MLflow."""
