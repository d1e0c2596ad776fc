"""Model-dependent measurements a component may ask for between optimizer steps."""
