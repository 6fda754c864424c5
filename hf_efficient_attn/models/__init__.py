"""One folder a family: its config and its classes, where the frame and one mechanism meet."""
