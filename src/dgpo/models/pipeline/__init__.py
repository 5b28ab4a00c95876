"""One diffusers pipeline, driven as it is, for rollouts and for single points of its loop."""
