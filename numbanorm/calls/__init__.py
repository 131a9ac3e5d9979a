"""From arguments to a launch: every check and its message, what is prepared once, and which backend serves an array."""
