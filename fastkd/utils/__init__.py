"""Files, processes, random numbers and progress; imports nothing of fastkd."""
