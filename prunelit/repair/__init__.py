"""Repair without training: bias compensation and least-squares refits after a cut."""
