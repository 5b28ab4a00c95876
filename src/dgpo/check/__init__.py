"""`dgpo check`: whether a pipeline can be sampled, trained and saved by this library."""
