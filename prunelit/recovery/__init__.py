"""Training a cut model back to quality, and merging what was trained."""
