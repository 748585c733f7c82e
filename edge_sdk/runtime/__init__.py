"""Runtime: from a request to an answer, inside one process. Knows no transport."""
