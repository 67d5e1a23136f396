"""What every part of a process needs: errors, progress, files, ranks and time; it knows no model."""
