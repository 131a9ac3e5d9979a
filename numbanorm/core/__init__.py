"""What everything stands on: the table of norms, layouts, plans, dtypes, memory and threads. Knows no kernel."""
