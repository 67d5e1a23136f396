"""What every part of a process needs: errors, events, progress, files, ranks and timing; it knows no model."""
