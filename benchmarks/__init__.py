"""Tasks, data, tuning, comparison and reports around curvopt; not part of the installed library."""
