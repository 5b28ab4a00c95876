"""The run folder: checkpoints, metrics, pictures, the model card, and writing that survives."""
