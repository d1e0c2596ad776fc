"""Planning of rounds from the decisions of the components, the limit on overhead, and the plan of a run."""
