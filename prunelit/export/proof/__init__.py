"""The proof of an export: what was written is loaded again and compared with the model in memory."""
