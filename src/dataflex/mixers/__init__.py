"""The built-in mixers. Each method has a module, and shared parts are in the ``base_*`` modules."""
