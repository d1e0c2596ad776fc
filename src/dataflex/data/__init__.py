"""The pool, the plans made from it, and the loader that trains them."""
