"""The run folder: metrics, pictures, the model card, the progress line, and loggers."""
