"""How good a model is: loss of each domain while it trains, and downstream tasks afterwards."""
