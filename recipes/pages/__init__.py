"""Pages of HTML that need no other file: the frame with its style sheet, and charts."""
