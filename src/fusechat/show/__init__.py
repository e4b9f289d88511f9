"""Two tokenizations of one text, one above the other, aligned at bytes: on the terminal, as a page, as JSON."""
