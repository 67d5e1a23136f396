"""Quality without training: biases and least-squares refits after a cut."""
