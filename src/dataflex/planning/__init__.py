"""From the components' decisions to plans: rounds, overhead and the plan of a run."""
