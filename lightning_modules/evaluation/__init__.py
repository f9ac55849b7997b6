"""One engine for every measured figure: clips, prompts, prediction, measure."""
