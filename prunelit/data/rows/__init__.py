"""Text sources as rows: their options and shapes, the text of a row, and how windows are drawn from rows."""
