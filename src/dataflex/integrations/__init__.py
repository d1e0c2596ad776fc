"""The trainers that DataFlex runs in."""
