"""What the benchmark measures: sizes, figures, their floors and their processes."""
