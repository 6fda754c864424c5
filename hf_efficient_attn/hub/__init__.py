"""What goes to the Hub with a model: its card, and on request its code in one file."""
