"""What is left behind: of a run report.json, the model folder, the table; of a comparison tables and pictures."""
