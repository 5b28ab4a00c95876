"""Compare recipes with the same prompts and the same evaluation, on the same machine."""
