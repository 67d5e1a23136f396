"""The proof of an export: another process loads what was written and is compared with the model in memory."""
