"""Networks of the tasks, written so that every operation has second derivatives."""
