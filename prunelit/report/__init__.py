"""What a run leaves behind: report.json, the model folder, the table."""
