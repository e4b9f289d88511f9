"""Stage 7, report: results that one can look at, on a page and on the terminal."""
