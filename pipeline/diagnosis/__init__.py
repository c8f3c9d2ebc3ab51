"""What the measurements of `profiling` mean and what to change: accounting, cause, predictions and the report."""
