"""Training: the recipe's section, data, objectives, the loop and its states."""
