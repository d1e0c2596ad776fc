"""Why a sample was, or was not, trained on."""
