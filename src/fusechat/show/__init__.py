"""Draws two tokenizations of one text above each other, aligned by bytes: on a terminal, as a page, as JSON."""
