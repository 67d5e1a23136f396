"""Pages, figures and text, drawn from the `Record` of a run or from a plan alone."""
