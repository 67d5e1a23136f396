"""Cutting inside training loops that are not Lightning's Trainer: transformers, TRL, accelerate, Fabric."""
