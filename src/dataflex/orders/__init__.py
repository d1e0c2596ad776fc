"""The built-in orders. Each method has a module, and shared parts are in the ``base_*`` modules."""
