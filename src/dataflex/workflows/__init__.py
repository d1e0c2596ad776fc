"""Several trainings one after another, of which a later one uses what an earlier one found."""
