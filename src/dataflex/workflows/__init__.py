"""Commands that run several trainings in sequence, each of which uses the results of the trainings before it."""
